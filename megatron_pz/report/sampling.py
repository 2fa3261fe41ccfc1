"""Which rollouts the page shows: all of a small run, evenly chosen steps of a big one; and of how many that is.

`rollouts.jsonl` can be tens of gigabytes, the page some megabytes. One pass finds where each step lies (the step is
read off the head of a line, the rest is not parsed); then only chosen steps are read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_pz.report.jsonl import parse, step_of

Row = dict[str, Any]

MAX_TEXT = 6000
"""Longest response that is shown whole, in characters; of a longer one, the beginning and the end."""


@dataclass
class StepPlace:
    """Where the rows of a step lie. A step done twice has several places."""

    ranges: list[tuple[int, int]] = field(default_factory=list)  # (first byte, behind the last byte)
    num_rows: int = 0
    num_bytes: int = 0


@dataclass(frozen=True)
class Index:
    """Steps of a file in order, and how many lines could not be read."""

    steps: dict[int, StepPlace]
    num_damaged: int

    @property
    def num_rows(self) -> int:
        return sum(place.num_rows for place in self.steps.values())

    @property
    def num_bytes(self) -> int:
        return sum(place.num_bytes for place in self.steps.values())


@dataclass(frozen=True)
class Sample:
    """Rows to show, by step, and what they are of."""

    rows: dict[int, list[Row]]
    num_rows: int  # in the file
    num_steps: int  # in the file
    num_damaged: int  # lines that could not be read
    num_left_out_paragraphs: int  # in the steps that are shown

    @property
    def num_shown(self) -> int:
        return sum(len(rows) for rows in self.rows.values())


def index(path: Path) -> Index:
    """Places of all steps of `path`; empty if there is no file."""
    steps: dict[int, StepPlace] = {}
    num_damaged, at = 0, 0
    if not path.is_file():
        return Index({}, 0)
    with path.open("rb") as file:
        for line in file:
            behind = at + len(line)
            step = step_of(line) if line.endswith(b"\n") or parse(line) else None
            if step is None:
                num_damaged += bool(line.strip())
            else:
                place = steps.setdefault(step, StepPlace())
                if place.ranges and place.ranges[-1][1] == at:
                    place.ranges[-1] = (place.ranges[-1][0], behind)
                else:
                    place.ranges.append((at, behind))
                place.num_rows += 1
                place.num_bytes += len(line)
            at = behind
    return Index(dict(sorted(steps.items())), num_damaged)


def evenly(items: list[int], n: int) -> list[int]:
    """`n` of `items`, evenly, with the first and the last; all where there are no more than `n`.

    >>> evenly([1, 2, 3, 4, 5, 6, 7], 3), evenly([1, 2], 5), evenly([1, 2, 3], 1)
    ([1, 4, 7], [1, 2], [3])
    """
    if len(items) <= n:
        return list(items)
    if n <= 1:
        return items[-1:]
    return [items[round(i * (len(items) - 1) / (n - 1))] for i in range(n)]


def sample(path: Path, max_bytes: int, min_steps: int = 24) -> Sample:
    """Rows of `path` in about `max_bytes`: whole steps if that leaves `min_steps`, else some paragraphs of each.

    At least one paragraph of a chosen step is kept, whatever its size.
    """
    found = index(path)
    steps = list(found.steps)
    if not steps:
        return Sample({}, 0, 0, found.num_damaged, 0)
    fits = int(max_bytes * len(steps) / max(1, found.num_bytes))
    chosen = evenly(steps, max(fits, min_steps))
    budget = max_bytes // len(chosen) if found.num_bytes > max_bytes else found.num_bytes
    rows: dict[int, list[Row]] = {}
    num_damaged, left_out = found.num_damaged, 0
    with path.open("rb") as file:
        for step in chosen:
            read: list[tuple[Row, int]] = []
            for first, behind in found.steps[step].ranges:
                file.seek(first)
                while file.tell() < behind:
                    line = file.readline()
                    row = parse(line)
                    if row is None:
                        num_damaged += 1
                    else:
                        read.append((_trimmed(row), len(line)))
            rows[step], dropped = _within(read, budget)
            left_out += dropped
    return Sample(rows, found.num_rows, len(steps), num_damaged, left_out)


def _within(rows: list[tuple[Row, int]], budget: int) -> tuple[list[Row], int]:
    """Rows of the first paragraphs that fit into `budget` bytes (the first always), and how many paragraphs do not."""
    sizes: dict[str, int] = {}
    for row, size in rows:
        paragraph = str(row.get("paragraph_id"))
        sizes[paragraph] = sizes.get(paragraph, 0) + size
    kept: set[str] = set()
    total = 0
    for paragraph, size in sizes.items():
        if kept and total + size > budget:
            break
        kept.add(paragraph)
        total += size
    return [row for row, _ in rows if str(row.get("paragraph_id")) in kept], len(sizes) - len(kept)


def _trimmed(row: Row) -> Row:
    response = row.get("response")
    if not isinstance(response, str) or len(response) <= MAX_TEXT:
        return row
    head, tail = MAX_TEXT * 2 // 3, MAX_TEXT // 3  # what was thought first, and how it ended: the answer
    left_out = len(response) - head - tail
    return row | {"response": f"{response[:head]}\n… {left_out} characters left out …\n{response[-tail:]}"}
