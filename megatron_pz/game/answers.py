"""Reading a prediction and comparing it with the hidden text (docs/paper.md 3.3)."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

from megatron_pz.game.braces import is_balanced, last_braced
from megatron_pz.game.spans import unfinished
from megatron_pz.types import FinishReason
from megatron_pz.words import is_word

Match = Literal["strict", "casefold"]


@dataclass(frozen=True)
class AnswerReading:
    """What a prediction says: the boxed text, stripped, or the reason why it says nothing."""

    answer: str | None
    reason: str | None


def read_answer(response: str, finish_reason: FinishReason) -> AnswerReading:
    r"""The text in the last `\boxed{...}` of `response`; a response that was cut off counts as none.

    Args:
        response: the response's text, behind what the prompt already opened (`Template.answer_prefix`).
    """
    parsed = last_braced(response, "boxed")
    answer = parsed.strip() if parsed is not None else None
    return AnswerReading(answer, unfinished(finish_reason) or ("no_box" if answer is None else None))


def normalise(answer: str) -> str:
    r"""`answer` without LaTeX's and white space's accidents: one outer `\text{}` or `\mathrm{}` unwrapped, escapes
    undone, Unicode NFKC (widths of characters are one), white space stripped and collapsed. Nothing else is forgiven.

    >>> normalise(r" \text{Tom \& Jerry} ")
    'Tom & Jerry'
    """
    text = answer.strip()
    wrapped = re.fullmatch(r"\\(?:text|mathrm)\{(.*)\}", text, flags=re.DOTALL)
    if wrapped and is_balanced(wrapped.group(1)):
        text = wrapped.group(1)
    text = re.sub(r"\\([_%&#$])", r"\1", text)
    return " ".join(unicodedata.normalize("NFKC", text).split())


def matches(answer: str | None, target: str, match: Match = "strict") -> bool:
    """True where `answer` is `target` after normalisation: Eq. 8's condition. No answer never matches.

    >>> matches("elevate", "elevation"), matches("  New\\nYork", "New York")
    (False, True)
    """
    if answer is None:
        return False
    found, wanted = normalise(answer), normalise(target)
    if match == "casefold":
        found, wanted = _fold(found), _fold(wanted)
    return found == wanted


def is_near_miss(answer: str | None, target: str, match: Match = "strict") -> bool:
    """True where `answer` is wrong by case, punctuation or spacing alone.

    >>> is_near_miss("the u.s.", "The US"), is_near_miss("Rome", "Paris")
    (True, False)
    """
    if answer is None or matches(answer, target, match):
        return False
    found, wanted = _letters(normalise(answer)), _letters(normalise(target))
    return found == wanted and bool(found)


def _fold(text: str) -> str:
    return unicodedata.normalize("NFKC", text.casefold())


def _letters(text: str) -> str:
    return "".join(character for character in _fold(text) if is_word(character) and character != "_")
