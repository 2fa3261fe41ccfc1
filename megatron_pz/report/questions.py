"""The fixed masks, question by question: what was answered at each evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_pz.report.jsonl import read_rows
from megatron_pz.report.prompts import find_frame

MAX_QUESTIONS = 40
"""Questions of each set that the page shows."""


def read_questions(path: Path, max_questions: int = MAX_QUESTIONS) -> list[dict[str, Any]]:
    """The first questions of each set of `eval.jsonl`, each with its answers by step.

    `{"set", "text", "target", "answers": [{"step", "answer", "right"}]}`; `text` is the masked
    paragraph. Rows are rollout rows with a `set`; a question is known by its prompt.
    """
    questions: dict[tuple[str, str], dict[str, Any]] = {}
    per_set: dict[str, int] = {}
    for row in read_rows(path):
        which, prompt = str(row.get("set", "")), row.get("prompt")
        if not isinstance(prompt, str):
            continue
        key = (which, prompt)
        if key not in questions:
            if per_set.get(which, 0) >= max_questions:
                continue
            per_set[which] = per_set.get(which, 0) + 1
            questions[key] = {"set": which, "text": prompt, "target": row.get("target"), "answers": []}
        answer = {"step": row.get("step"), "answer": row.get("answer"), "right": bool(row.get("reward"))}
        questions[key]["answers"].append(answer)
    frame = find_frame(prompt for _, prompt in questions)
    return [question | {"text": frame.open(question["text"])} for question in questions.values()]
