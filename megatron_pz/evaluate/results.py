"""What an evaluation leaves: one JSON, one table, curves over checkpoints. Whole or absent."""

from __future__ import annotations

import dataclasses
import html
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_pz.errors import DiskError
from megatron_pz.evaluate.intervals import Estimate
from megatron_pz.evaluate.score import SuiteScore, averages

JSON_FILE, TABLE_FILE, CURVES_FILE = "evaluation.json", "table.md", "curves.svg"
_COLOURS = (
    "#1f77b4",
    "#d62728",
    "#2ca02c",
    "#9467bd",
    "#ff7f0e",
    "#8c564b",
    "#17becf",
    "#7f7f7f",
    "#bcbd22",
    "#e377c2",
)


@dataclass(frozen=True)
class Examined:
    """One model's results."""

    label: str
    model: str  # name of the weights
    step: int | None  # of a checkpoint
    scores: Mapping[str, SuiteScore]


def write_results(folder: Path, examined: Sequence[Examined], how: Mapping[str, Any]) -> None:
    """Write `evaluation.json`, `table.md` and, with two checkpoints or more, `curves.svg`.

    Args:
        how: what was asked and how, for the record.

    Raises:
        DiskError: there is no room or no right.
    """
    _write(folder / JSON_FILE, json.dumps(to_json(examined, how), indent=1, ensure_ascii=False) + "\n")
    _write(folder / TABLE_FILE, table(examined))
    if sum(one.step is not None for one in examined) > 1:
        _write(folder / CURVES_FILE, curves([one for one in examined if one.step is not None]))


def to_json(examined: Sequence[Examined], how: Mapping[str, Any]) -> dict[str, Any]:
    """Everything, in shares."""
    models = []
    for one in examined:
        suites = {}
        for name, score in one.scores.items():
            found = dataclasses.asdict(score)
            del found["question_means"]  # of each answer in graded.jsonl
            suites[name] = found
        found_averages = {name: dataclasses.asdict(value) for name, value in averages(one.scores).items()}
        models.append(
            {"label": one.label, "model": one.model, "step": one.step, "suites": suites, "averages": found_averages}
        )
    return {"how": dict(how), "models": models}


def table(examined: Sequence[Examined]) -> str:
    """Markdown, in percent: a row a suite and grader with its 95% interval, then the averages."""
    heads = ["", "grader", *(one.label.replace("|", "\\|") for one in examined)]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]

    def line(name: str, grader: str, cells: Sequence[str]) -> None:
        lines.append("| " + " | ".join([name, grader, *cells]) + " |")

    for suite, first in examined[0].scores.items():
        found = [one.scores[suite] for one in examined]
        mean = f" (mean@{first.num_samples})" if first.num_samples > 1 else ""
        for grader in first.scores:
            line(suite + mean, grader, [_shown(score.scores[grader]) for score in found])
        line("", "no answer found", [f"{100 * score.not_found_share:.1f}" for score in found])
        if first.guessed is not None:
            line("", "strict + random guess", [f"{100 * (score.guessed or 0):.2f}" for score in found])
        line("", "cut off", [f"{100 * score.truncated_share:.1f}" for score in found])
        for grader in first.num_faults:
            if any(score.num_faults[grader] for score in found):
                line("", f"{grader}: not found out", [f"{score.num_faults[grader]} answers" for score in found])
    means = [averages(one.scores) for one in examined]
    for name in means[0]:
        line(f"**{name}**", "", [_shown(mean[name]) for mean in means])
    num_questions = sum(score.num_questions for score in examined[0].scores.values())
    lines += [
        "",
        f"Percent of {num_questions} questions, with 95% intervals: Wilson's for one answer a question, else a bootstrap over "
        "questions. Averages take each set's first grader.",
        "",
    ]
    return "\n".join(lines)


def _shown(value: Estimate) -> str:
    return f"{100 * value.mean:.2f} [{100 * value.low:.2f}, {100 * value.high:.2f}]"


def curves(examined: Sequence[Examined]) -> str:
    """An SVG: the headline score of each suite, and the averages, over steps, with intervals as bands."""
    ordered = sorted(examined, key=lambda one: one.step or 0)
    lines: dict[str, list[tuple[int, Estimate]]] = {}
    for one in ordered:
        found = {name: score.main for name, score in one.scores.items()} | averages(one.scores)
        for name, value in found.items():
            lines.setdefault(name, []).append((one.step or 0, value))
    first, last = ordered[0].step or 0, ordered[-1].step or 0
    top = max(value.high for points in lines.values() for _, value in points) or 1.0
    left, upper, width, height = 50, 20, 560, 300

    def at(step: int, share: float) -> str:
        x = left + width * (step - first) / max(1, last - first)
        return f"{x:.1f},{upper + height * (1 - share / top):.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 190} {upper + height + 40}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect x="{left}" y="{upper}" width="{width}" height="{height}" fill="none" stroke="#999"/>',
        f'<text x="4" y="{upper + 8}">{100 * top:.1f}%</text><text x="4" y="{upper + height}">0%</text>',
        f'<text x="{left}" y="{upper + height + 18}">step {first}</text>',
        f'<text x="{left + width}" y="{upper + height + 18}" text-anchor="end">step {last}</text>',
    ]
    for index, (name, points) in enumerate(lines.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        band = [at(step, value.low) for step, value in points] + [at(step, value.high) for step, value in points[::-1]]
        path = " ".join(at(step, value.mean) for step, value in points)
        parts += [
            f'<polygon points="{" ".join(band)}" fill="{colour}" fill-opacity="0.12"/>',
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"><title>{html.escape(name)}</title></polyline>',
            f'<text x="{left + width + 10}" y="{upper + 14 + 18 * index}" fill="{colour}">{html.escape(name)} '
            f"{100 * points[-1][1].mean:.1f}</text>",
        ]
    return "\n".join([*parts, "</svg>", ""])


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".tmp-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise DiskError(f"{path} cannot be written: {error.strerror}. Choose another --out.") from error
