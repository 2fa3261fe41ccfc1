"""Hiding a span: where it occurs, which of these places are hidden, and the text that is left.

1. Occurrences are exact, case-sensitive and do not overlap, counted from the left (docs/paper.md 2.8). A place that
   would part a character from its marks is none.
2. Putting the answer back for every `[mask]` gives the paragraph's text, character for character.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from megatron_pz.config.schema import TaskConfig
from megatron_pz.types import Mask, Paragraph
from megatron_pz.words import cuts_character, cuts_word

MASK_TOKEN = "[mask]"
"""What stands for hidden words in the masked text."""

Span = tuple[int, int]
Validity = Literal["default", "one_mask", "whole_words"]


@dataclass(frozen=True)
class MaskRules:
    """Which spans can be hidden, and where (`[task]` of the settings)."""

    validity: Validity = "default"
    max_occurrences: int = 7
    max_fraction: float = 0.5

    @classmethod
    def of(cls, config: TaskConfig) -> MaskRules:
        return cls(config.mask_validity, config.max_occurrences, config.max_mask_fraction)


def occurrences(text: str, answer: str) -> list[Span]:
    """Every place of `answer` in `text`, from the left, none overlapping another.

    >>> occurrences("banana", "ana")
    [(1, 4)]
    """
    assert answer, "an empty answer occurs everywhere"
    spans = []
    start = text.find(answer)
    while start >= 0:
        end = start + len(answer)
        is_whole = not (cuts_character(text, start) or cuts_character(text, end))
        if is_whole:
            spans.append((start, end))
        start = text.find(answer, end if is_whole else start + 1)
    return spans


def hide(text: str, spans: Sequence[Span]) -> str:
    """`text` with each of `spans` (in order, not overlapping) replaced by `[mask]`."""
    pieces, done = [], 0
    for start, end in spans:
        pieces += [text[done:start], MASK_TOKEN]
        done = end
    return "".join([*pieces, text[done:]])


def make_mask(paragraph: Paragraph, answer: str, found: Sequence[Span], validity: Validity, rng: random.Random) -> Mask:
    """The mask that hides `answer`: all places in `found`, or under `one_mask` one of them, drawn with `rng`."""
    hidden = (rng.choice(found),) if validity == "one_mask" else tuple(found)
    return Mask(paragraph.id, answer, hidden, hide(paragraph.text, hidden), num_occurrences=len(found))


def restore(mask: Mask) -> str:
    """The paragraph's text again."""
    return mask.masked_text.replace(MASK_TOKEN, mask.answer)


def shuffle_context(mask: Mask, rng: random.Random) -> Mask:
    """The same question with the words around it, and each `[mask]`, in the order that `rng` gives them.

    Words are what stands between white space; in scripts without it, each character. `spans` are those of the paragraph.

    >>> made = Mask("p", "Paris", ((0, 5),), "[mask] is the capital of France.")
    >>> shuffle_context(made, random.Random(1)).masked_text
    'the capital France. [mask] of is'
    """
    text = mask.masked_text
    pieces = re.findall(r"\[mask\]|(?:(?!\[mask\])\S)+", text)
    if not re.search(r"\s", text):
        pieces = [part for piece in pieces for part in ([piece] if piece == MASK_TOKEN else _characters(piece))]
    rng.shuffle(pieces)
    return replace(mask, masked_text=(" " if re.search(r"\s", text) else "").join(pieces))


def _characters(text: str) -> list[str]:
    cuts = [0, *(cut for cut in range(1, len(text)) if not cuts_character(text, cut)), len(text)]
    return [text[start:end] for start, end in pairwise(cuts)]


def cuts_no_word(text: str, span: Span) -> bool:
    """True where neither end of `span` lies inside a word.

    >>> cuts_no_word("the cat", (4, 7)), cuts_no_word("the cats", (4, 7))
    (True, False)
    """
    return not any(cuts_word(text, cut) for cut in span)
