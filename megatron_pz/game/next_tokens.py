"""Next-token questions: a text cut behind one of its tokens, which is hidden (docs/paper.md 5).

The question is `text before the token` + `[mask]`; nothing after the token is shown. White space that the token begins with stays in
view, since answers are compared without it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

from megatron_pz.game.braces import is_balanced
from megatron_pz.game.masking import MASK_TOKEN
from megatron_pz.types import Mask, Paragraph

_TRIES = 64
"""Draws before a paragraph is given up."""


def hardest(entropies: Sequence[float], share: float) -> list[int]:
    """Places of the `share` of tokens with the largest entropy, in the order of the text; at least one.

    The first token takes no part: nothing comes before it.

    >>> hardest([9.0, 0.5, 2.0, 1.0, 3.0, 0.1], 0.4)
    [2, 4]
    """
    places = range(1, len(entropies))
    most = sorted(places, key=lambda place: -entropies[place])[: math.ceil(share * len(places))]
    return sorted(most)


def hide_token(paragraph: Paragraph, before: str, through: str) -> Mask | None:
    """The question about the token between `before` and `through`, two beginnings of the paragraph's text; None where the
    token cannot be asked for: it is white space, part of a character, or would not survive a box.

    >>> hide_token(Paragraph("p", "Paris is big."), "Paris", "Paris is").masked_text
    'Paris [mask]'
    """
    if not (paragraph.text.startswith(through) and through.startswith(before) and before.strip()):
        return None
    answer = through[len(before) :].strip()
    if not answer or MASK_TOKEN in through or "\\" in answer or not is_balanced(answer):
        return None
    start = through.index(answer, len(before))
    end = start + len(answer)
    return Mask(paragraph.id, answer, ((start, end),), paragraph.text[:start] + MASK_TOKEN)


def next_token_mask(
    paragraph: Paragraph,
    token_ids: Sequence[int],
    places: Sequence[int],
    decode: Callable[[Sequence[int]], str],
    rng: random.Random,
    *,
    fits: Callable[[Mask], bool],
) -> Mask | None:
    """A question about one of the tokens at `places`, chosen by `rng`; None where none of those drawn can be asked for.

    Args:
        token_ids: of the paragraph's text.
        decode: text of token ids.
        fits: further condition on the question, e.g. that its prompt is short enough.
    """
    for _ in range(_TRIES if places else 0):
        place = rng.choice(places)
        mask = hide_token(paragraph, decode(token_ids[:place]), decode(token_ids[: place + 1]))
        if mask is not None and fits(mask):
            return mask
    return None
