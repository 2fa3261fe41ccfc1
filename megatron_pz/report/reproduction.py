"""Whether a run that was made again is the same run: what was recorded beforehand, and every number afterwards."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_pz.report.jsonl import EVAL_FILE, METRICS_FILE, ROLLOUTS_FILE, read_rows

OF_THE_MACHINE = ("time/", "memory/", "engine/")
"""Metrics that no seed decides: seconds, bytes and what befell the servers."""

COMPARED = (METRICS_FILE, ROLLOUTS_FILE, EVAL_FILE)
_MOST = 10
"""Differences that are told of a file."""


def different_grounds(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What `run.json` of two runs disagrees on, a line each: code, packages, text, weights.

    >>> different_grounds({"commit": "a", "versions": {"torch": "2"}}, {"commit": "b", "versions": {"torch": "2"}})
    ['commit: was a, is b']
    """
    lines = []
    for name in ("megatron_pz", "commit", "python", "world_size", "model", "parameters"):
        if before.get(name) != now.get(name):
            lines.append(f"{name}: was {before.get(name)}, is {now.get(name)}")
    for table in ("versions", "paragraphs", "hashes"):
        old, new = before.get(table) or {}, now.get(table) or {}
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                lines.append(f"{table} of {name}: was {old.get(name)}, is {new.get(name)}")
    return lines


def differences(before: Path, now: Path, last_step: int) -> list[str]:
    """Where the records of two run directories differ up to `last_step`, a line each; empty where they are the same run."""
    return [line for name in COMPARED for line in _of_file(name, before / name, now / name, last_step)]


def _of_file(name: str, before: Path, now: Path, last_step: int) -> list[str]:
    lines: list[str] = []
    pairs = itertools.zip_longest(_rows(before, last_step), _rows(now, last_step))
    for number, (old, new) in enumerate(pairs, 1):
        if old is None or new is None:
            lines.append(f"{name}: one run has no row {number}")
            break
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                lines.append(
                    f"{name}, row {number} (step {old.get('step')}), {key}: was {_short(old, key)}, is {_short(new, key)}"
                )
        if len(lines) >= _MOST:
            return [*lines[:_MOST], f"{name}: and more"]
    return lines


def _rows(path: Path, last_step: int) -> Iterator[dict[str, Any]]:
    for row in _up_to(read_rows(path), last_step):
        yield {key: value for key, value in row.items() if not key.startswith(OF_THE_MACHINE)}


def _up_to(rows: Iterable[dict[str, Any]], last_step: int) -> Iterator[dict[str, Any]]:
    return itertools.takewhile(lambda row: int(row["step"]) <= last_step, rows)


def _short(row: Mapping[str, Any], key: str) -> str:
    text = repr(row.get(key))
    return text if len(text) <= 80 else text[:77] + "..."
