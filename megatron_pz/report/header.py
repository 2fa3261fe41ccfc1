"""The head of the page: what run this is, and how it came out. Made here, so that it is there without scripts too."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_pz.report.console import duration
from megatron_pz.report.run_files import RunFiles

_WINDOW = 10  # records that "now" and "at first" are means of


def header_html(run: RunFiles) -> str:
    """Title, facts and key figures, escaped."""
    return f"<h1>{html.escape(run.name)}</h1>\n{_lead(run)}\n{_facts(run)}\n{_tiles(run)}"


def _lead(run: RunFiles) -> str:
    steps = run.curves.steps
    wanted = _setting(run, "train", "train_iters")
    if not steps:
        return '<p class="lead">Nothing has been recorded in this run directory yet.</p>'
    done = f"step {steps[-1]:,}" + (f" of {wanted:,}" if isinstance(wanted, int) else "")
    task = _setting(run, "task", "task")
    return f'<p class="lead">{html.escape(" · ".join(filter(None, (str(task or ""), done))))}</p>'


def _facts(run: RunFiles) -> str:
    versions = run.facts.get("versions")
    rows: list[tuple[str, Any]] = [
        ("Model", _setting(run, "model", "hf_model")),
        ("Text", _setting(run, "corpus", "data_path")),
        ("Round", _round(run)),
        ("Layout", _layout(run)),
        ("Learning rate", _setting(run, "train", "lr")),
        ("Seed", _setting(run, "train", "seed")),
        ("Commit", run.facts.get("commit")),
        (
            "Versions",
            ", ".join(f"{k} {v}" for k, v in versions.items() if v) if isinstance(versions, Mapping) else versions,
        ),
        ("Attribution", run.facts.get("attribution")),
    ]
    shown = [
        f'<div class="{_width(str(value))}"><dt>{name}</dt><dd>{html.escape(str(value))}</dd></div>'
        for name, value in rows
        if value not in (None, "")
    ]
    return f'<dl class="facts">{"".join(shown)}</dl>' if shown else ""


def _width(text: str) -> str:
    return "whole" if len(text) > 90 else "wide" if len(text) > 28 else ""


def _round(run: RunFiles) -> str | None:
    names = ("paragraphs_per_step", "n_masks_per_paragraph", "n_predictions_per_mask")
    counts = [_setting(run, "task", name) for name in names]
    if None in counts or _setting(run, "task", "task") in ("continue_pt", "sft"):
        return None
    return f"{counts[0]} paragraphs × {counts[1]} masks × {counts[2]} predictions"


def _layout(run: RunFiles) -> str | None:
    parallel = run.config.get("parallel")
    if not isinstance(parallel, Mapping):
        return None
    names = {"TP": "tensor_model", "PP": "pipeline_model", "EP": "expert_model", "CP": "context"}
    sizes = [f"{short} {parallel.get(f'{name}_parallel_size', 1)}" for short, name in names.items()]
    world_size = run.facts.get("world_size")
    ranks = [] if world_size is None else [f"{world_size} rank{'' if world_size == 1 else 's'}"]
    return " · ".join([*sizes, *ranks])


def _tiles(run: RunFiles) -> str:
    columns = run.curves.columns
    tiles = [
        _tile("Fixed masks", columns.get("eval/fixed_masks/accuracy"), "{:.1%}", "answered right", window=1),
        _tile("Held-out masks", columns.get("eval/held_out/accuracy"), "{:.1%}", "answered right", window=1),
        _tile("Mask reward", columns.get("reward/mask/mean"), "{:.3f}", "mean of the last records"),
        _tile("Prediction reward", columns.get("reward/prediction/mean"), "{:.3f}", "mean of the last records"),
        _tile("Valid masks", columns.get("mask/valid_rate"), "{:.0%}", "mean of the last records"),
        _tile("Loss", columns.get("loss"), "{:.4g}", "mean of the last records")
        if "reward/prediction/mean" not in columns
        else "",
        _total("Step", columns.get("time/step_s"), run.curves.steps_per_point),
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>' if any(tiles) else ""


def _tile(name: str, column: Sequence[float | None] | None, form: str, what: str, window: int = _WINDOW) -> str:
    values = [value for value in column or () if value is not None]
    if not values:
        return ""
    now = form.format(_mean(values[-window:]))
    first = form.format(_mean(values[:window]))
    came_from = f"from {first}" if len(values) > window else what
    return (
        f'<div class="tile"><span class="tile-name">{name}</span><strong>{now}</strong>'
        f'<span class="tile-note">{came_from}</span></div>'
    )


def _total(name: str, column: Sequence[float | None] | None, steps_per_point: int) -> str:
    values = [value for value in column or () if value is not None]
    if not values:
        return ""
    return (
        f'<div class="tile"><span class="tile-name">{name}</span><strong>{_mean(values[-_WINDOW:]):.3g} s</strong>'
        f'<span class="tile-note">{duration(sum(values) * steps_per_point)} in all</span></div>'
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _setting(run: RunFiles, section: str, name: str) -> Any:
    table = run.config.get(section)
    return table.get(name) if isinstance(table, Mapping) else None
