"""Runs beside each other at equal cost: variants of one setting, some seeds each, from the same policy.

1. Cost is tokens through the policy since the run began: those sampled and those trained on, prompts and padding included.
2. All runs are read at their last evaluation within the budget: what the cheapest of them had spent at its own last one.
3. Intervals are over questions (each question's score is the mean over its samples and seeds), so that answers to one question
   do not count as independent; the spread over seeds is told beside them. A gain is over the questions whose prompts are the
   same (a variant's templates or `mask_validity` may make others of them).
4. Where one variant is paid for format alone, what the others gain over it, question by question, is their gain beyond format.
5. Variants can be left out of the budget: that one (when all its answers can be read its groups are dropped, and it costs little)
   and one that learns nothing, whose accuracy no step changes. Their last evaluation within the budget counts.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_pz.errors import ReportError
from megatron_pz.report.jsonl import EVAL_FILE, METRICS_FILE, read_rows

Z = 1.96
"""Standard errors on each side of a 95% interval."""

Question = tuple[str, str | None]
"""Its mask_id and the prompt that asks it."""


@dataclass(frozen=True)
class Point:
    """A run at one of its evaluations."""

    step: int
    generated: float  # tokens sampled so far
    packed: float  # tokens trained on so far, prompts and padding included
    seconds: float  # of play, update and what is between them, evaluations left out
    accuracy: float

    @property
    def cost(self) -> float:
        """Tokens through the policy."""
        return self.generated + self.packed


@dataclass(frozen=True)
class Run:
    """The evaluations of one run on one set of questions."""

    variant: str
    seed: int
    folder: Path
    points: tuple[Point, ...]

    def at(self, budget: float) -> Point:
        """The last evaluation that cost at most `budget`."""
        return [point for point in self.points if point.cost <= budget][-1]


@dataclass(frozen=True)
class Row:
    """A variant at the budget, over its seeds."""

    variant: str
    num_seeds: int
    steps: float
    generated: float
    packed: float
    seconds: float
    before: float
    after: float
    lowest: float  # of a seed
    highest: float
    interval: float  # half a 95% interval of `after`, over questions
    gain: float | None  # over the reference, same questions; None: this is it, or no question is alike
    gain_interval: float | None
    num_questions: int = 0  # of that gain
    unlike: int = 0  # questions that the reference was not asked in the same words
    beyond_format: float | None = (
        None  # over the variant that is paid for format alone; None: this is it, or there is none
    )
    beyond_format_interval: float | None = None


def read_run(variant: str, seed: int, folder: Path, questions: str = "fixed_masks") -> Run:
    """The run in `folder`.

    Raises:
        ReportError: it has no evaluation of these questions.
    """
    points: list[Point] = []
    generated = packed = seconds = 0.0
    for row in _by_step(read_rows(folder / METRICS_FILE)):
        generated += _number(row, "tokens/generated")
        packed += _number(row, "tokens/packed")
        seconds += _number(row, "time/step_s") - _number(row, "time/eval_s")
        accuracy = row.get(f"eval/{questions}/accuracy")
        if accuracy is not None:
            points.append(Point(int(row["step"]), generated, packed, seconds, float(accuracy)))
    if not points:
        raise ReportError(
            f"{folder / METRICS_FILE} has no eval/{questions}/accuracy; a comparison needs an evaluation in every run. "
            "Set --eval-interval, and --held-out-path for held_out."
        )
    return Run(variant, seed, folder, tuple(points))


def last_step(folder: Path) -> int | None:
    """Updates that the run in `folder` has done; None: it has no metrics yet."""
    return max((int(row["step"]) for row in read_rows(folder / METRICS_FILE)), default=None)


def budget(runs: Sequence[Run], unbudgeted: Collection[str] = ()) -> float:
    """Tokens that every run but those of the variants in `unbudgeted` had spent by its last evaluation."""
    return min(run.points[-1].cost for run in [run for run in runs if run.variant not in unbudgeted] or runs)


def compare(
    runs: Sequence[Run],
    reference: str,
    questions: str = "fixed_masks",
    format_control: str | None = None,
    unbudgeted: Collection[str] = (),
) -> list[Row]:
    """A row for each variant, in the order of `runs`.

    Args:
        reference: the variant that gains are measured against, question by question.
        format_control: the variant that is paid for format alone; None: there is none.
        unbudgeted: variants that do not lower the budget.

    Raises:
        ReportError: there is no such variant.
    """
    variants = list(dict.fromkeys(run.variant for run in runs))
    if unknown := [name for name in (reference, format_control) if name is not None and name not in variants]:
        raise ReportError(f"the reference is {unknown[0]!r}; it must be one of the variants: {', '.join(variants)}.")
    spent = budget(runs, unbudgeted)
    scores = {
        name: _question_scores([run for run in runs if run.variant == name], spent, questions) for name in variants
    }
    return [
        _row(name, [run for run in runs if run.variant == name], spent, scores, reference, format_control)
        for name in variants
    ]


def markdown(rows: Sequence[Row], spent: float, questions: str, unbudgeted: Collection[str] = ()) -> str:
    """The table that `compare` made, in the words of a paper's; the last column stands where a variant is paid for format alone."""
    has_format = any(row.beyond_format is not None for row in rows)
    fewer = [row.variant for row in rows if row.variant in unbudgeted]
    lines = [
        f"Accuracy on `{questions}` at {_count(spent)} tokens sampled and trained on, by every run"
        + (f" but those of {' and '.join(fewer)}: at most so many." if fewer else "."),
        "",
        "| variant | seeds | steps | tokens sampled | tokens trained on | minutes | before | after (95%) | seeds, lowest to highest |"
        " over the reference (95%) |" + " beyond format (95%) |" * has_format,
        "|---|---|---|---|---|---|---|---|---|---|" + "---|" * has_format,
    ]
    for row in rows:
        gain = _points(row.gain, row.gain_interval) + f" ({row.num_questions} questions)" * bool(
            row.unlike and row.num_questions
        )
        beyond = f" {_points(row.beyond_format, row.beyond_format_interval)} |" if has_format else ""
        lines.append(
            f"| {row.variant} | {row.num_seeds} | {row.steps:.0f} | {_count(row.generated)} | {_count(row.packed)} | "
            f"{row.seconds / 60:.1f} | {row.before:.1%} | {row.after:.1%} ± {100 * row.interval:.1f} | "
            f"{row.lowest:.1%} to {row.highest:.1%} | {gain or ('no question alike' if row.unlike else 'reference')} |{beyond}"
        )
    lines += [
        f"\n{row.variant}: {row.unlike} questions not put to the reference in the same words; its gain is over {row.num_questions}."
        for row in rows
        if row.unlike
    ]
    return "\n".join(lines) + "\n"


def _row(
    variant: str,
    runs: Sequence[Run],
    spent: float,
    scores: Mapping[str, Mapping[Question, float]],
    reference: str,
    format_control: str | None,
) -> Row:
    points = [run.at(spent) for run in runs]
    after = [point.accuracy for point in points]
    gain, gain_interval = _over(variant, reference, scores)
    beyond, beyond_interval = _over(variant, format_control, scores)
    return Row(
        variant=variant,
        num_seeds=len(runs),
        steps=fmean(point.step for point in points),
        generated=fmean(point.generated for point in points),
        packed=fmean(point.packed for point in points),
        seconds=fmean(point.seconds for point in points),
        before=fmean(run.points[0].accuracy for run in runs),
        after=fmean(after),
        lowest=min(after),
        highest=max(after),
        interval=half_interval(list(scores[variant].values())),
        gain=gain,
        gain_interval=gain_interval,
        num_questions=len(scores[variant].keys() & scores[reference].keys()),
        unlike=len(scores[variant].keys() - scores[reference].keys()),
        beyond_format=beyond,
        beyond_format_interval=beyond_interval,
    )


def _over(
    variant: str, other: str | None, scores: Mapping[str, Mapping[Question, float]]
) -> tuple[float, float] | tuple[None, None]:
    """Mean difference of `variant` over `other` on the same questions, and half its interval; None for itself and without any."""
    if other is None or variant == other:
        return None, None
    own, base = scores[variant], scores[other]
    differences = [own[question] - base[question] for question in own.keys() & base.keys()]
    if not differences:
        return None, None
    return fmean(differences), half_interval(differences)


def _points(value: float | None, interval: float | None) -> str:
    return "" if value is None else f"{100 * value:+.1f} ± {100 * (interval or 0):.1f}"


def half_interval(values: Sequence[float]) -> float:
    """Half of the 95% interval of the mean of independent `values`, by the normal law; 0 of a single one.

    >>> round(half_interval([0.0, 1.0, 1.0, 0.0]), 4)  # deviation 0.5774, standard error 0.2887
    0.5658
    """
    if len(values) < 2:
        return 0.0
    mean = fmean(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Z * math.sqrt(variance / len(values))


def _question_scores(runs: Sequence[Run], spent: float, questions: str) -> dict[Question, float]:
    """Mean score of each question over the samples of all `runs`."""
    found: dict[Question, list[float]] = {}
    for run in runs:
        step = run.at(spent).step
        last: dict[Question, list[float]] = {}
        for row in read_rows(run.folder / EVAL_FILE):
            if row["step"] == step and row["set"] == questions:
                last.setdefault((row["mask_id"], row.get("prompt")), []).append(float(row["reward"]))
        for question, scores in last.items():
            found.setdefault(question, []).append(fmean(scores))
    if not found:
        raise ReportError(
            f"{runs[0].folder / EVAL_FILE} has no answers to {questions} at the evaluations that {METRICS_FILE} names."
        )
    return {question: fmean(scores) for question, scores in found.items()}


def _by_step(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows in the order of their steps, the last one of each."""
    return [row for _, row in sorted({int(row["step"]): row for row in rows}.items())]


def _number(row: Mapping[str, Any], name: str) -> float:
    value = row.get(name)
    return float(value) if value is not None else 0.0


def _count(tokens: float) -> str:
    """
    >>> _count(812.0), _count(81_200.0), _count(3_460_000.0)
    ('812', '81.2 k', '3.46 M')
    """
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if tokens >= size:
            return f"{tokens / size:.3g} {unit}"
    return f"{tokens:.0f}"
