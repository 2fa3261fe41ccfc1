"""Rollout rows as a tree for the page: step, paragraph, mask, prediction. Missing fields are passed over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from megatron_pz.report.games import MASK_TOKEN
from megatron_pz.report.prompts import Frame, find_frame, hidden_spans

Row = Mapping[str, Any]
Node = dict[str, Any]

_SHOWN = ("response", "answer", "valid", "reject_reason", "reward", "advantage", "trained", "num_tokens")


def tree(rows_by_step: Mapping[int, Iterable[Row]]) -> list[Node]:
    """One node a step: `{"step", "paragraphs": [{"id", "text", "masks": [... "spans", "predictions": [...]]}]}`.

    `spans` are (start, end) in characters (code points) of `text`. A mask that chance chose has no `response`.
    """
    listed = {step: list(rows) for step, rows in rows_by_step.items()}
    every = [row for rows in listed.values() for row in rows]
    frames = {
        role: find_frame(str(row.get("prompt", "")) for row in every if row.get("role") == role)
        for role in ("mask", "prediction")
    }
    nodes = [{"step": step, "paragraphs": _paragraphs(rows, frames)} for step, rows in listed.items()]
    return [node for node in nodes if node["paragraphs"]]


def _paragraphs(rows: list[Row], frames: Mapping[str, Frame]) -> list[Node]:
    predictions: dict[Any, list[Row]] = {}
    for row in rows:
        if row.get("role") == "prediction":
            predictions.setdefault(row.get("mask_id"), []).append(row)
    # The same paragraph can come twice in a step (a small corpus): its mask groups stay apart.
    played: dict[Any, Node] = {}
    for row in rows:
        if row.get("role") != "mask":
            continue
        text = frames["mask"].open(str(row.get("prompt", "")))
        node = played.setdefault(row.get("group_id"), {"id": row.get("paragraph_id"), "text": text, "masks": []})
        node["masks"].append(_mask(row, predictions.pop(row.get("mask_id"), []), text, frames))
    for own in predictions.values():  # masks that chance chose
        masked = frames["prediction"].open(str(own[0].get("prompt", "")))
        text = masked.replace(MASK_TOKEN, str(own[0].get("target") or ""))
        key = ("random", own[0].get("paragraph_id"))
        node = played.setdefault(key, {"id": own[0].get("paragraph_id"), "text": text, "masks": []})
        node["masks"].append(_mask(None, own, node["text"], frames))
    return list(played.values())


def _mask(row: Row | None, predictions: list[Row], text: str, frames: Mapping[str, Frame]) -> Node:
    node: Node = {name: row.get(name) for name in _SHOWN} if row is not None else {"valid": True}
    if predictions:
        node["answer"] = predictions[0].get("target") or node.get("answer")
    masked = frames["prediction"].open(str(predictions[0].get("prompt", ""))) if predictions else None
    answer = node.get("answer")
    node["spans"] = hidden_spans(text, answer, masked) if isinstance(answer, str) else []
    node["predictions"] = [{name: prediction.get(name) for name in _SHOWN} for prediction in predictions]
    first = row if row is not None else predictions[0]
    node["mask_id"], node["version"] = first.get("mask_id"), first.get("weight_version")
    return node
