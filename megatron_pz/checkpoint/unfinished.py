"""A folder that is written file by file, and goes on where it was after a kill.

DST                 appears when everything is in it
.tmp-DST            until then; `progress.jsonl` in it tells the files that are whole, with their checksums
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_pz.checkpoint.checksum import of_file
from megatron_pz.errors import DiskError

LOG = "progress.jsonl"


@dataclass(frozen=True)
class WholeFile:
    """A finished file of the folder. `holds` is what its writer has to know of it later, as JSON."""

    name: str
    bytes: int
    checksum: str
    holds: Any


class UnfinishedFolder:
    """`.tmp-NAME` beside `final`.

    Args:
        final: must not exist.
        task: what the files depend on, as JSON. Files of another task are thrown away.

    Raises:
        DiskError: `final` is there, or its parent cannot be written.
    """

    def __init__(self, final: Path, task: Mapping[str, Any]) -> None:
        if final.exists():
            raise DiskError(f"{final} exists already. Remove it, or choose another name for the output.")
        self.final, self.folder = final, final.with_name(f".tmp-{final.name}")
        self.files = self._kept(dict(task))
        self._finisher = ThreadPoolExecutor(1)  # beside the next file's writing
        self._pending: list[Future[WholeFile]] = []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            kept = {self.folder / file.name for file in self.files}
            for path in self.folder.rglob("*"):
                if path.is_file() and path not in kept:
                    path.unlink()
            lines = [json.dumps(task), *(json.dumps(asdict(file)) for file in self.files)]
            self._log = (self.folder / LOG).open("w", encoding="utf-8")
            self._write("".join(f"{line}\n" for line in lines))
        except OSError as error:
            raise DiskError(f"{self.folder} cannot be written: {error.strerror}.") from error

    def add(self, name: str, finish: Callable[[], str], holds: Any) -> None:
        """`name` is written, and whole once `finish`, which gives its checksum, has brought it to disk.

        What failed to finish is told at the next call.
        """
        for pending in self._pending:
            if pending.done():
                pending.result()
        self._pending.append(self._finisher.submit(self._note, name, finish, holds))

    def settle(self) -> list[WholeFile]:
        """All whole files; waits for the checksums."""
        self.files += [pending.result() for pending in self._pending]
        self._pending = []
        return self.files

    def finish(self, seal: Callable[[], None] = lambda: None) -> None:
        """Let the folder appear.

        Args:
            seal: writes what lists all files.
        """
        self.settle()
        self.close()
        (self.folder / LOG).unlink()
        seal()
        self.folder.rename(self.final)

    def close(self) -> None:
        """Stop; what is whole stays for the next time."""
        self._finisher.shutdown()
        self._log.close()

    def _note(self, name: str, finish: Callable[[], str], holds: Any) -> WholeFile:
        checksum = finish()
        file = WholeFile(name, (self.folder / name).stat().st_size, checksum, holds)
        self._write(json.dumps(asdict(file)) + "\n")
        return file

    def _write(self, text: str) -> None:
        self._log.write(text)
        self._log.flush()
        os.fsync(self._log.fileno())

    def _kept(self, task: dict[str, Any]) -> list[WholeFile]:
        """Files of an earlier attempt at the same, up to the first that is not as it was."""
        try:
            first, *lines = (self.folder / LOG).read_text(encoding="utf-8").splitlines()
            if json.loads(first) != task:
                return []
            kept = []
            for line in lines:
                file = WholeFile(**json.loads(line))
                path = self.folder / file.name
                if path.stat().st_size != file.bytes or of_file(path) != file.checksum:
                    break
                kept.append(file)
        except (OSError, ValueError, TypeError):
            return []
        return kept
