r"""Rows of published data sets to questions. Every field that a set's publishers use is known by name; others are ignored.

| set | fields |
|---|---|
| MMLU-Pro | question_id, question, options, answer (letter), answer_index, category |
| SuperGPQA | uuid, question, options, answer (text), answer_letter, discipline, field, subfield, difficulty |
| BBEH | hub: task, input, target, mini; repository: {"examples": [{input, target}]} in `<task>/task.json` |
| MATH-500, MATH | unique_id, problem, solution, answer, subject or type, level (MATH has no answer: the solution's last box) |
| OlympiadBench | id, question, final_answer (list), unit, subfield |
| Minerva | question, answer; in Qwen's files problem, solution (its last box), idx |
| GSM8K | question, answer (the reasoning, `#### `, the number) |
| AMC23, AIME24 | id, question or problem, answer (a number or a text) |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_pz.errors import CorpusError
from megatron_pz.evaluate.suites.table import Suite
from megatron_pz.game.braces import last_braced
from megatron_pz.grade.choices import LETTERS

_ID = ("question_id", "uuid", "unique_id", "id", "ID", "idx")
_QUESTION = ("question", "problem", "Problem", "input")
_CATEGORY = ("category", "discipline", "task", "subject", "type", "subfield")


@dataclass(frozen=True, slots=True)
class Question:
    """One question, as it is asked and graded."""

    id: str
    text: str
    target: str  # a letter, or the answer
    options: tuple[str, ...] = ()
    category: str = ""


def to_question(suite: Suite, row: Mapping[str, Any], place: str) -> Question:
    """The question of a row.

    Args:
        place: the row's, in messages and as the id of one that has none.

    Raises:
        CorpusError: a field is missing or not as published.
    """
    text = _text(row, _QUESTION, place)
    given = str(next((row[name] for name in _ID if row.get(name) is not None), place))
    category = str(next((row[name] for name in _CATEGORY if row.get(name)), ""))
    if suite.kind == "choice":
        options = row.get("options")
        if not isinstance(options, Sequence) or isinstance(options, str) or not 2 <= len(options) <= len(LETTERS):
            raise CorpusError(f"{place}: `options` is {options!r:.80}; wanted a list of 2 to {len(LETTERS)} texts.")
        kept = tuple(str(option) for option in options if str(option) != "N/A")
        return Question(given, text, _letter(row, len(options), place), kept, category)
    if suite.kind == "bbeh":
        return Question(given, text, str(row.get("target", "")) or _missing(row, ("target",), place), (), category)
    return Question(given, text, _answer(row, place), (), category)


def _letter(row: Mapping[str, Any], count: int, place: str) -> str:
    letter = row.get("answer_letter") or row.get("answer")
    if not isinstance(letter, str) or letter not in LETTERS[:count]:
        raise CorpusError(f"{place}: the answer is {letter!r:.80}; wanted a letter of A to {LETTERS[count - 1]}.")
    return letter


def _answer(row: Mapping[str, Any], place: str) -> str:
    for name in ("final_answer", "answer", "Answer"):
        if (found := row.get(name)) is not None:
            first = found[0] if isinstance(found, Sequence) and not isinstance(found, str) and found else found
            text = str(first).split("####")[-1].strip() if "####" in str(first) else str(first).strip()
            if isinstance(first, float) and first.is_integer():
                text = str(int(first))
            return text.strip("$").strip() or _missing(row, (name,), place)
    solution = row.get("solution") or row.get("Solution")
    boxed = last_braced(str(solution), "boxed") if solution else None
    return boxed if boxed is not None else _missing(row, ("answer", "final_answer", "solution"), place)


def _text(row: Mapping[str, Any], names: Sequence[str], place: str) -> str:
    found = next((row[name] for name in names if isinstance(row.get(name), str) and row[name].strip()), None)
    return found.strip() if found is not None else _missing(row, names, place)


def _missing(row: Mapping[str, Any], names: Sequence[str], place: str) -> str:
    raise CorpusError(
        f"{place}: none of {', '.join(f'`{name}`' for name in names)} holds an answer or a text among the fields {list(row)}. "
        "Give the file in the form in which the set is published."
    )
