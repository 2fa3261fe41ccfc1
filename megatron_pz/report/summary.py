"""What a run says at its end: updates made, and fixed-mask accuracy before and after."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_SETS = {"fixed_masks": "fixed masks", "held_out": "held-out text"}


def summary_lines(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Lines on the records of `metrics.jsonl`, of all starts of the run.

    >>> rows = [{"step": 0, "eval/fixed_masks/accuracy": 0.25}, {"step": 1, "grad_norm": 1.0, "num_surviving_groups": 9},
    ...         {"step": 2, "grad_norm": 1.0, "num_surviving_groups": 7, "eval/fixed_masks/accuracy": 0.5}]
    >>> summary_lines(rows)
    ['2 updates in 2 steps, from 16 surviving groups', 'fixed masks  25.0% before  50.0% after  (+25.0 points, steps 0 to 2)']
    """
    by_step = {int(row["step"]): row for row in rows}
    updates = [row for row in by_step.values() if "grad_norm" in row]
    groups = sum(int(row.get("num_surviving_groups", 0)) for row in updates)
    lines = [f"{len(updates)} updates in {max(by_step, default=0)} steps"]
    if groups:
        lines[0] += f", from {groups} surviving groups"
    for name, label in _SETS.items():
        key = f"eval/{name}/accuracy"
        scored = [(step, float(by_step[step][key])) for step in sorted(by_step) if key in by_step[step]]
        if len(scored) > 1:
            (first, before), (last, after) = scored[0], scored[-1]
            rise = f"{100 * (after - before):+.1f} points, steps {first} to {last}"
            lines.append(f"{label}  {before:.1%} before  {after:.1%} after  ({rise})")
    return lines
