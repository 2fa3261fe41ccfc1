"""One HTML page about a run: curves and rollouts, with all data, script and style inside. It asks no network.

1. Text of the corpus and of the policy is data: it stands in a JSON block in which `<` is escaped, and the script puts
   it on the page as text. A policy in the page's head lets no other script run.
2. The page says how much of the run it shows.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import megatron_pz
from megatron_pz.config.schema import TaskConfig
from megatron_pz.errors import DiskError
from megatron_pz.report.alarm_table import alarms_html
from megatron_pz.report.header import header_html
from megatron_pz.report.jsonl import EVAL_FILE, METRICS_FILE, ROLLOUTS_FILE, read_rows
from megatron_pz.report.questions import read_questions
from megatron_pz.report.rounds import tree
from megatron_pz.report.run_files import Curves, RunFiles, read_run
from megatron_pz.report.sampling import Sample, sample
from megatron_pz.report.verdicts import verdicts

MAX_ROLLOUT_BYTES = 12_000_000
"""Of rollouts in the page, about."""

_SCRIPTS = ("dom.js", "charts.js", "curves.js", "browser.js", "main.js")


def build_page(run_dir: Path, max_rollout_bytes: int = MAX_ROLLOUT_BYTES) -> str:
    """The page of the run in `run_dir`, finished, running or killed.

    Raises:
        ReportError: there is no such folder.
    """
    run = read_run(run_dir)
    shown = sample(run_dir / ROLLOUTS_FILE, max_rollout_bytes)
    task = _task(run.config)
    data = {
        "steps": run.curves.steps,
        "columns": run.curves.columns,
        "verdicts": verdicts(task.task),
        "rounds": [node | {"verdicts": verdicts(task.at(node["step"]))} for node in tree(shown.rows)],
        "questions": read_questions(run_dir / EVAL_FILE),
    }
    script = "\n".join(_asset(name) for name in _SCRIPTS)
    parts = {
        "policy": _content_policy(script),
        "title": html.escape(run.name),
        "style": _asset("page.css"),
        "header": header_html(run),
        "alarms": alarms_html(read_rows(run_dir / METRICS_FILE)),
        "curves_note": html.escape(curves_note(run.curves)),
        "rollouts_note": html.escape(rollouts_note(shown, run)),
        "config": html.escape(run.config_text or "config.toml is not there."),
        "facts": html.escape(
            json.dumps(run.facts, indent=2, ensure_ascii=False) if run.facts else "run.json is not there."
        ),
        "footer": html.escape(f"megatron_pz {megatron_pz.__version__}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"),
        "data": to_script_json(data),
        "script": script,
    }
    page = _asset("page.html")
    # One pass over the template: what is put in is not searched again.
    pieces = page.split("{{")
    return pieces[0] + "".join(parts[name] + rest for name, rest in (piece.split("}}", 1) for piece in pieces[1:]))


def write_page(run_dir: Path, out: Path | None = None, max_rollout_bytes: int = MAX_ROLLOUT_BYTES) -> Path:
    """Write the page to `out` (default `report.html` in `run_dir`), whole or not at all; its path.

    Raises:
        ReportError: there is no such folder.
        DiskError: no room or no right.
    """
    text = build_page(run_dir, max_rollout_bytes)
    path = out or run_dir / "report.html"
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8", errors="replace")
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise DiskError(f"{path} ({len(text)} characters) cannot be written: {error.strerror}. Try --out.") from error
    return path


def to_script_json(data: Mapping[str, Any]) -> str:
    """`data` as JSON that can stand in a script element: it holds no `<`, so nothing in it can end the element.

    >>> to_script_json({"a": "</script>"})
    '{"a":"\\\\u003c/script>"}'
    """
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def curves_note(curves: Curves) -> str:
    """What the curves are of, in words."""
    if not curves.steps:
        return "No step has been recorded yet."
    notes = []
    if curves.steps_per_point > 1:
        notes.append(f"Each point is the mean of {curves.steps_per_point} records.")
    if curves.num_damaged:
        notes.append(f"{_count(curves.num_damaged, 'line')} of metrics.jsonl could not be read.")
    return " ".join(notes)


def rollouts_note(shown: Sample, run: RunFiles) -> str:
    """How many rollouts the page shows of how many, in words."""
    if not shown.num_rows:
        task = run.config.get("task", {}).get("task", "")
        if task in ("continue_pt", "sft"):
            return f"The task {task} learns from text and generates nothing."
        return "No rollout has been recorded yet."
    if shown.num_shown == shown.num_rows:
        note = f"All {_count(shown.num_rows, 'rollout')} of {_count(shown.num_steps, 'step')}."
    else:
        note = (
            f"{shown.num_shown:,} of {_count(shown.num_rows, 'rollout')}: "
            f"{len(shown.rows):,} of {_count(shown.num_steps, 'step')}, evenly chosen"
        )
        if shown.num_left_out_paragraphs:
            note += f", without {_count(shown.num_left_out_paragraphs, 'paragraph')} of these steps"
        note += ". The rest is in rollouts.jsonl."
    if shown.num_damaged:
        note += f" {_count(shown.num_damaged, 'line')} could not be read."
    return note


def _task(config: Mapping[str, Any]) -> TaskConfig:
    """What was played when; other settings of the task are left at their defaults."""
    given = config.get("task", {})
    return TaskConfig(**{name: given[name] for name in ("task", "warm_up_task", "warm_up_task_steps") if name in given})


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _content_policy(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    others = "style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    return f"default-src 'none'; script-src 'sha256-{digest}'; {others}"


def _asset(name: str) -> str:
    return (files("megatron_pz.report") / "assets" / name).read_text(encoding="utf-8")
