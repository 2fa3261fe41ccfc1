"""Figures in files: a comparison (accuracy against tokens, a line a variant, a band over its seeds), metrics over steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from megatron_pz.errors import ReportError, pip_install
from megatron_pz.report.comparison import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NUM_PLACES = 200


def draw(runs: Sequence[Run], spent: float, path: Path, title: str) -> None:
    """Write `path`, by its ending a PNG or an SVG.

    Args:
        spent: tokens that the table compares at, marked by a line.

    Raises:
        ReportError: matplotlib is not installed.
    """
    figure = _figure((7, 4.2))
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
    _save(figure, path)


def draw_metrics(rows: Sequence[Mapping[str, float]], names: Sequence[str], path: Path) -> None:
    """Write `path`, by its ending a PNG or an SVG: metrics `names` over steps, a line each, from 0.

    Args:
        rows: of `metrics.jsonl`.

    Raises:
        ReportError: matplotlib is not installed.
    """
    figure = _figure((7, 3))
    axes = figure.subplots()
    for name in names:
        found = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*found, strict=True), label=name, linewidth=1.2)
    axes.set(xlabel="step")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def need_matplotlib() -> type[Figure]:
    """Its class of figures; asked for first by what draws after hours.

    Raises:
        ReportError: it is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ReportError(
            f"A figure needs matplotlib, which is not installed: {pip_install('megatron_pz[plots]')}"
        ) from error
    return Figure


def _figure(size: tuple[float, float]) -> Figure:
    return need_matplotlib()(figsize=size, layout="constrained")


def _save(figure: Figure, path: Path) -> None:
    from matplotlib import rc_context

    partial = path.with_name(f".tmp-{path.name}")
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": path.name}):  # text as text: a tenth of the bytes
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
