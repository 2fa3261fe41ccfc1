"""Masks that teach nothing: what luck can guess, and what the text still says. Measured, never refused (docs/paper.md 11)."""

from __future__ import annotations

import re

from megatron_pz.game.masking import MASK_TOKEN
from megatron_pz.game.stop_words import STOP_WORDS, is_stop_words
from megatron_pz.words import script

_WORD = re.compile(r"[^\W_]+")
_LONGEST_ENDING = 3
_SHORTEST_STEM, _SHORTEST_WORD, _SHORTEST_HANGUL = 5, 4, 2


def is_lottery(answer: str) -> bool:
    """True where few answers are possible, so that one of eight guesses hits: one character, digits alone, function words.

    >>> [is_lottery(answer) for answer in ("7", "1905", "x", "of the", "Paris", "3 May")]
    [True, True, True, True, False, False]
    """
    found = "".join(_WORD.findall(answer))
    return len(found) <= 1 or found.isdigit() or is_stop_words(answer)


def is_still_visible(answer: str, masked_text: str) -> bool:
    """True where `masked_text` says the answer anyway: in another case, or each of its words inflected.

    Words are one where the shorter (four letters or more, in Hangul two) begins the other and up to three follow, or
    where they share five letters or more and up to three differ at the end of each. That finds "elevate" beside
    "elevation" and takes "contact" for "contain": it is a rate to watch, no verdict on a mask. Function words and
    digits have no inflection.

    >>> is_still_visible("Amber", "[mask] is a resin; raw amber is cut"), is_still_visible("Paris", "[mask] is large")
    (True, False)
    >>> is_still_visible("tree resin", "[mask] flows out of trees. Resins harden."), is_still_visible("tree resin", "a tree")
    (True, False)
    """
    said, rest = answer.casefold(), masked_text.casefold().replace(MASK_TOKEN, "\n")
    wanted = [word for word in _WORD.findall(said) if word not in STOP_WORDS]
    if not wanted:
        return False
    if re.search(rf"(?<![^\W_]){re.escape(said)}(?![^\W_])", rest):
        return True
    words = set(_WORD.findall(rest))
    return all(any(_is_one_word(word, other) for other in words) for word in wanted)


def _is_one_word(word: str, other: str) -> bool:
    if word == other:
        return True
    if not (word.isalpha() and other.isalpha()):
        return False
    shared = next((i for i, (a, b) in enumerate(zip(word, other, strict=False)) if a != b), min(len(word), len(other)))
    shorter, longer = sorted((len(word), len(other)))
    if longer - shared > _LONGEST_ENDING:
        return False
    if shared < shorter:
        return shared >= _SHORTEST_STEM
    return shared >= (_SHORTEST_HANGUL if script(word[0]) == "HANGUL" else _SHORTEST_WORD)
