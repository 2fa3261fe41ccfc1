"""A comparison as a figure: accuracy against tokens, a line a variant, a band over its seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from megatron_pz.errors import ReportError
from megatron_pz.report.comparison import Run

_NUM_PLACES = 200


def draw(runs: Sequence[Run], spent: float, path: Path, title: str) -> None:
    """Write `path`, by its ending a PNG or an SVG.

    Args:
        spent: tokens that the table compares at, marked by a line.

    Raises:
        ReportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ReportError('A figure needs matplotlib: pip install "megatron_pz[plots]".') from error
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for variant in dict.fromkeys(run.variant for run in runs):
        of_variant = [run for run in runs if run.variant == variant]
        end = min(run.points[-1].cost for run in of_variant)
        places = [end * place / _NUM_PLACES for place in range(_NUM_PLACES + 1)]
        heights = [[interpolated(run, place) for run in of_variant] for place in places]
        (line,) = axes.plot(places, [100 * fmean(row) for row in heights], label=variant)
        low, high = [100 * min(row) for row in heights], [100 * max(row) for row in heights]
        axes.fill_between(places, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.axvline(spent, color="0.6", linewidth=0.8, linestyle="--")
    axes.set(xlabel="tokens sampled and trained on", ylabel="accuracy, %", title=title)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    partial = path.with_name(f".tmp-{path.name}")
    figure.savefig(partial, dpi=144, metadata={"Date": None} if path.suffix == ".svg" else None)
    partial.rename(path)


def interpolated(run: Run, cost: float) -> float:
    """Accuracy of `run` at `cost` tokens, on straight lines between its evaluations; outside of them, the nearest."""
    before = [point for point in run.points if point.cost <= cost]
    after = [point for point in run.points if point.cost > cost]
    if not before or not after:
        return (before[-1] if before else after[0]).accuracy
    left, right = before[-1], after[0]
    share = (cost - left.cost) / (right.cost - left.cost)
    return left.accuracy + share * (right.accuracy - left.accuracy)
