"""Files of one JSON object a line, which a killed process leaves readable.

1. A row is appended by one write of whole lines; if the write fails, what it left is taken back.
2. A reader passes over a last line without its end, and counts lines that are not objects.
3. Rows stand in the order of their steps, so that a run continued from a checkpoint cuts off what it will do again.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_pz.errors import DiskError

METRICS_FILE, ROLLOUTS_FILE, EVAL_FILE = "metrics.jsonl", "rollouts.jsonl", "eval.jsonl"
"""In a run directory."""

# Rows that this project writes begin with their step: it can be read without parsing a long line.
_STEP = re.compile(rb'\{\s*"step":\s*(\d+)\s*[,}]')
_TAIL_BYTES = 1 << 16


class JsonLines:
    """An open file that rows are appended to. A partial last line, left by a kill, is cut off first.

    Raises:
        DiskError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise DiskError(f"{path} cannot be opened: {error.strerror}. Choose another --run-dir.") from error
        os.ftruncate(self._file, _end_of_last_line(self._file))

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write `rows`, all or none; they are with the operating system when this returns.

        Raises:
            DiskError: no room or no right; the file is as it was.
        """
        data = "".join(to_line(row) for row in rows).encode("utf-8")
        size = os.fstat(self._file).st_size
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._file, view) :]
        except OSError as error:
            os.ftruncate(self._file, size)
            raise DiskError(
                f"{self.path}: {len(data)} bytes could not be written: {error.strerror}. The file is as it was. "
                "Free some room and start the run again; it continues from its last checkpoint."
            ) from error

    def sync(self) -> None:
        """Have all rows on the disk itself, where they outlive a loss of power.

        Raises:
            DiskError: the disk refused some of them.
        """
        try:
            os.fsync(self._file)
        except OSError as error:
            raise DiskError(f"{self.path} could not be put on disk: {error.strerror}. Free some room.") from error

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def to_line(row: Mapping[str, Any]) -> str:
    """`row` as one line of JSON, `step` first. Numbers that JSON has no word for (nan, inf) become null.

    >>> to_line({"loss": float("nan"), "step": 2})
    '{"step": 2, "loss": null}\\n'
    """
    ordered = {"step": row["step"], **row} if "step" in row else dict(row)
    try:
        text = json.dumps(ordered, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(ordered), ensure_ascii=False, allow_nan=False)
    # A lone surrogate can come out of a tokenizer and cannot be encoded.
    return text.encode("utf-8", "backslashreplace").decode("utf-8") + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


@dataclass
class Damage:
    """Lines that a reader passed over."""

    num_lines: int = 0


def read_rows(path: Path, damage: Damage | None = None) -> Iterator[dict[str, Any]]:
    """Rows of `path`, one after another; none if there is no file. Unreadable lines are counted in `damage`."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            row = parse(line)
            if row is not None:
                yield row
            elif line.strip() and damage is not None:
                damage.num_lines += 1


def parse(line: bytes) -> dict[str, Any] | None:
    """The object on `line`; None if it is cut off, damaged or no object."""
    try:
        row = json.loads(line)
    except ValueError:  # JSON or UTF-8
        return None
    return row if isinstance(row, dict) else None


def step_of(line: bytes) -> int | None:
    """The `step` of the row on `line`, without parsing it where it stands first; None if it has none.

    >>> step_of(b'{"step": 12, "role": "mask"}'), step_of(b'{"role": "mask", "step": 3}'), step_of(b'{"st')
    (12, 3, None)
    """
    found = _STEP.match(line)
    if found:
        return int(found[1])
    row = parse(line)
    step = row.get("step") if row else None
    return step if isinstance(step, int) and not isinstance(step, bool) else None


def cut_after(path: Path, step: int) -> int:
    """Remove the rows from the first one of a later step on, with what is damaged behind it; how many lines that were.

    Called when a run is continued from the checkpoint of `step`.
    """
    if not path.is_file():
        return 0
    kept, removed = 0, 0
    try:
        with path.open("r+b") as file:
            for line in file:
                found = step_of(line)
                if removed or found is None and not line.endswith(b"\n") or found is not None and found > step:
                    removed += 1
                else:
                    kept += len(line)
            if removed:
                file.truncate(kept)
    except OSError as error:
        raise DiskError(f"{path} cannot be cut off after step {step}: {error.strerror}. Mend its rights.") from error
    return removed


def _end_of_last_line(file: int) -> int:
    """Size of the file up to and including its last line end, in bytes."""
    size = os.fstat(file).st_size
    end = size
    while end > 0:
        start = max(0, end - _TAIL_BYTES)
        found = os.pread(file, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
