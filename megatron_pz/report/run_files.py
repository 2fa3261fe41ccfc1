"""A run directory as the page wants it: settings, facts, curves. Whatever is missing or cut off is left out."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_pz.errors import ReportError
from megatron_pz.report.jsonl import METRICS_FILE, Damage, read_rows
from megatron_pz.report.metrics import METRICS

MAX_POINTS = 1500
"""Points of a curve; of a longer run, means of so many stretches of steps."""


@dataclass(frozen=True)
class Curves:
    """Metrics by column. `columns[name][i]` belongs to `steps[i]`, None where the step has no such value."""

    steps: tuple[int, ...] = ()
    columns: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    steps_per_point: int = 1
    num_damaged: int = 0


@dataclass(frozen=True)
class RunFiles:
    """What a page needs of a run directory, but for the rollouts."""

    name: str
    config_text: str
    config: Mapping[str, Any]
    facts: Mapping[str, Any]  # run.json
    curves: Curves


def read_run(run_dir: Path) -> RunFiles:
    """What stands in `run_dir`, rollouts and evaluation answers aside.

    Raises:
        ReportError: there is no such folder.
    """
    if not run_dir.is_dir():
        raise ReportError(
            f"{run_dir} is not a folder; wanted a run directory (checkpoint.run_dir of its settings), "
            "with metrics.jsonl in it."
        )
    config_text = _text(run_dir / "config.toml")
    return RunFiles(
        name=run_dir.resolve().name,
        config_text=config_text,
        config=_toml(config_text),
        facts=_json(_text(run_dir / "run.json")),
        curves=read_curves(run_dir / METRICS_FILE),
    )


def read_curves(path: Path, max_points: int = MAX_POINTS) -> Curves:
    """Curves of `metrics.jsonl`. Of a step that was done twice, the later record counts; unknown names are left out."""
    damage = Damage()
    by_step: dict[int, dict[str, Any]] = {}
    for row in read_rows(path, damage):
        step = row.get("step")
        if isinstance(step, int):
            by_step[step] = row
        else:
            damage.num_lines += 1
    steps = sorted(by_step)
    names = [name for name in METRICS if name != "step" and any(name in row for row in by_step.values())]
    columns = {name: [_number(by_step[step].get(name)) for step in steps] for name in names}
    stretch = max(1, math.ceil(len(steps) / max_points))
    if stretch > 1:
        columns = {
            name: [_mean(column[i : i + stretch]) for i in _starts(steps, stretch)] for name, column in columns.items()
        }
        steps = [steps[min(i + stretch, len(steps)) - 1] for i in _starts(steps, stretch)]
    return Curves(tuple(steps), columns, stretch, damage.num_lines)


def _starts(steps: Sequence[int], stretch: int) -> range:
    return range(0, len(steps), stretch)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(f"{value:.6g}")  # the page is read by eye


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _toml(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:  # cut off by a kill: the text itself is still shown
        return {}


def _json(text: str) -> dict[str, Any]:
    try:
        facts = json.loads(text)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}
