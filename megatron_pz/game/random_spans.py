"""Spans that chance chooses: the random-span baseline, supervised examples and fixed questions (docs/paper.md 5).

A span is a run of whole words: their number from a geometric law, clipped; its place uniform; the same validity as for
masks that the generator names. Punctuation at the ends is left out. What a word is in each script: `megatron_pz.words`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence

from megatron_pz.game.masking import MaskRules
from megatron_pz.game.seeds import derive
from megatron_pz.game.spans import hide_answer
from megatron_pz.types import Mask, Paragraph
from megatron_pz.words import words

MANY = 1 << 14
"""Paragraphs that fixed questions are chosen from: to read more is to wait at each start."""
_TRIES = 64
"""Draws before a paragraph is given up; one draw in ten or more is valid in ordinary text."""


def span_length(rng: random.Random, p: float, max_words: int) -> int:
    """Words in a span: 1 + the failures before a success of probability `p`, at most `max_words`."""
    length = 1
    while length < max_words and rng.random() >= p:
        length += 1
    return length


def random_mask(
    paragraph: Paragraph,
    rules: MaskRules,
    rng: random.Random,
    *,
    span_p: float,
    max_words: int,
    fits: Callable[[Mask], bool] | None = None,
) -> Mask | None:
    """A valid mask on a random span, or None where none was found.

    Args:
        fits: further condition on the mask, e.g. that its prompt is short enough.
    """
    places = words(paragraph.text)
    if not places:
        return None
    for _ in range(_TRIES):
        length = min(span_length(rng, span_p, max_words), len(places))
        first = rng.randrange(len(places) - length + 1)
        answer = paragraph.text[places[first][0] : places[first + length - 1][1]]
        mask = hide_answer(answer, paragraph, rules, rng).mask
        if mask is not None and (fits is None or fits(mask)):
            return mask
    return None


def fixed_masks(
    paragraphs: Sequence[Paragraph],
    n: int,
    seed: int,
    rules: MaskRules,
    *,
    span_p: float,
    max_words: int,
    fits: Callable[[Mask], bool] | None = None,
) -> list[Mask]:
    """`n` questions that are the same in every run: one random mask on each of `n` paragraphs chosen with `seed`.

    With fewer paragraphs than `n` each is asked about several times. Paragraphs without a valid span are passed over,
    so fewer than `n` may come back. Of more than `MANY` paragraphs, about `MANY` that `seed` draws are looked at.
    """
    candidates: Iterable[int] = range(len(paragraphs))
    if len(paragraphs) > MANY:
        candidates = {derive(seed, "candidate", draw) % len(paragraphs) for draw in range(MANY)}
    order = sorted(candidates, key=lambda index: derive(seed, "question", index, paragraphs[index].id))
    masks: list[Mask] = []
    repeat = 0
    while order and len(masks) < n:
        before = len(masks)
        for index in order:
            rng = random.Random(derive(seed, "span", index, paragraphs[index].id, repeat))
            mask = random_mask(paragraphs[index], rules, rng, span_p=span_p, max_words=max_words, fits=fits)
            if mask is not None:
                masks.append(mask)
            if len(masks) == n:
                return masks
        if len(masks) == before:
            break
        repeat += 1
    return masks
