"""The alarms as a table of the page: how each stands, what it means, what to do. Made here, so that it needs no script."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from typing import Any

from megatron_pz.report.alarms import Sign, State, Watch

_CHIP = {"sounds": "chip bad", "sounded": "chip", "silent": "chip good", "not measured": "chip"}
_HEAD = ("Alarm", "State", "Sign", "Meaning", "What to do")


def alarms_html(rows: Iterable[Mapping[str, Any]]) -> str:
    """Every alarm after `rows` of `metrics.jsonl`, those that sound first. Of a step done twice, the later record counts."""
    by_step = {row["step"]: row for row in rows if isinstance(row.get("step"), int)}
    states = Watch(by_step[step] for step in sorted(by_step)).states()
    order = list(_CHIP)
    body = "".join(_row(state) for state in sorted(states, key=lambda state: order.index(state.word)))
    head = "".join(f'<th scope="col">{name}</th>' for name in _HEAD)
    note = f"{sum(bool(state.sounding) for state in states)} of {len(states)} sound at the last record."
    return (
        f'<p class="note">{note} A sign is the mean of the last records that have the metric.</p>\n'
        f'<div class="alarms"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _row(state: State) -> str:
    alarm, word = state.alarm, state.word
    since = {"sounds": f"first at step {state.first}", "sounded": f"steps {state.first} to {state.last}"}.get(word, "")
    signs = "".join(
        f'<span class="sign{" past" if sign in state.sounding else ""}">{_sign(state, sign)}</span>'
        for sign in alarm.signs
    )
    cells = (
        f'<td><span class="{_CHIP[word]}">{word}</span> {since}</td>',
        f'<td class="signs">{signs}</td>',
        *(f"<td>{html.escape(text)}</td>" for text in (alarm.meaning, alarm.action)),
    )
    return (
        f'<tr class="{word.replace(" ", "-")}"><th scope="row">{alarm.name.replace("_", " ")}</th>{"".join(cells)}</tr>'
    )


def _sign(state: State, sign: Sign) -> str:
    """Lines break between names of metrics and what is said of them, nowhere else."""
    value = f"{state.values[sign]:.3g}" if sign in state.values else "no value"
    metrics, side, limit = str(sign).rpartition(f" {sign.side} ")
    pieces = [*metrics.split(), f"{side}{limit}: {value}".strip()]
    return " ".join(f'<span class="whole">{html.escape(piece)}</span>' for piece in pieces)
