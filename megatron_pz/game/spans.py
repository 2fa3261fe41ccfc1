"""Reading a mask rollout: which span it names, and if that span cannot be hidden, why not (docs/paper.md 2.8).

Every reason is one of `MASK_REJECT_REASONS`, so that each can be counted.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from megatron_pz.game.braces import is_balanced, last_braced
from megatron_pz.game.masking import MASK_TOKEN, MaskRules, cuts_no_word, make_mask, occurrences
from megatron_pz.types import FinishReason, Mask, Paragraph

MASK_REJECT_REASONS = (
    "truncated",  # the response was cut off at its token limit
    "aborted",  # the engine gave it up
    "no_mask",  # no balanced \mask{...}
    "empty",  # nothing, or white space, between the braces
    "forbidden_text",  # the span contains [mask], a backslash or a brace without its partner
    "not_in_paragraph",
    "too_many_occurrences",
    "whole_paragraph",
    "too_long",  # more than the allowed share of the paragraph's characters
    "partial_word",  # under `whole_words`: some occurrence begins or ends inside a word
    "prompt_too_long",  # the prediction prompt would not fit
)
"""Why a mask rollout is invalid."""


@dataclass(frozen=True)
class SpanReading:
    """What a mask rollout says: the span as parsed, and either a mask or the reason why there is none."""

    answer: str | None
    mask: Mask | None
    reason: str | None


def unfinished(finish_reason: FinishReason) -> str | None:
    """The reject reason of a response that did not come to its own end, else None."""
    return {"stop": None, "length": "truncated", "abort": "aborted"}[finish_reason]


def read_span(
    response: str, paragraph: Paragraph, finish_reason: FinishReason, rules: MaskRules, rng: random.Random
) -> SpanReading:
    r"""The span that the last `\mask{...}` of `response` names. `rng` chooses the place under `one_mask`.

    Args:
        response: the response's text, behind what the prompt already opened (`Template.answer_prefix`).
    """
    parsed = last_braced(response, "mask")
    answer = parsed.strip() if parsed is not None else None
    if (reason := unfinished(finish_reason)) is not None:
        return SpanReading(answer, None, reason)
    if answer is None:
        return SpanReading(None, None, "no_mask")
    return hide_answer(answer, paragraph, rules, rng)


def hide_answer(answer: str, paragraph: Paragraph, rules: MaskRules, rng: random.Random) -> SpanReading:
    """The mask that hides `answer` in `paragraph`, or the reason why it cannot be hidden."""
    reason = reject_reason(answer, paragraph.text, rules)
    if reason is not None:
        return SpanReading(answer, None, reason)
    found = occurrences(paragraph.text, answer)
    return SpanReading(answer, make_mask(paragraph, answer, found, rules.validity, rng), None)


def reject_reason(answer: str, text: str, rules: MaskRules) -> str | None:
    """Why `answer` cannot be hidden in `text`; None where it can.

    >>> reject_reason("Paris", "Paris is the capital of France.", MaskRules()) is None
    True
    >>> reject_reason("Rome", "Paris is the capital of France.", MaskRules())
    'not_in_paragraph'
    """
    if not answer:
        return "empty"
    if MASK_TOKEN in answer or "\\" in answer or not is_balanced(answer):
        return "forbidden_text"
    found = occurrences(text, answer)
    if not found:
        return "not_in_paragraph"
    if len(found) > rules.max_occurrences:
        return "too_many_occurrences"
    if answer == text.strip():
        return "whole_paragraph"
    if len(answer) > rules.max_fraction * len(text):
        return "too_long"
    if rules.validity == "whole_words" and not all(cuts_no_word(text, span) for span in found):
        return "partial_word"
    return None
