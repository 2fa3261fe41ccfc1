"""Which paragraphs are played: neither too short nor too long, and free of the game's own words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from megatron_pz.errors import CorpusError
from megatron_pz.types import Encoder, Paragraph, Tokenizer

RESERVED = ("[mask]", "\\mask", "\\boxed")
"""What the game itself writes; a text that contains it could not be told from the game (docs/paper.md 4 and 11)."""

SELECTION_REASONS = ("too_short", "too_long", "reserved_text", "special_token", "prompt_too_long")
"""Why a paragraph is left out: the keys of the counts, beside `kept`."""


def select(
    paragraphs: Sequence[Paragraph],
    tokenizer: Tokenizer,
    min_tokens: int,
    max_tokens: int,
    *,
    prompt_ids: Callable[[str], Sequence[int]] | None = None,
    max_prompt_tokens: int | None = None,
) -> tuple[list[Paragraph], dict[str, int]]:
    """The paragraphs that can be played, in their order, and how many were kept and left out, by reason.

    Args:
        min_tokens: fewest tokens of the text alone; as many are kept.
        max_tokens: most tokens of the text alone; as many are kept.
        prompt_ids: makes the longest prompt about a text (`tasks.ask.Asker.mask_prompt_ids`); None: not checked.
        max_prompt_tokens: most tokens of that prompt.

    Raises:
        CorpusError: none is left.
    """
    counts: Counter[str] = Counter()
    kept = []
    for paragraph in paragraphs:
        reason = _reason(paragraph.text, tokenizer, min_tokens, max_tokens)
        if reason is None and prompt_ids is not None and max_prompt_tokens is not None:
            reason = "prompt_too_long" if len(prompt_ids(paragraph.text)) > max_prompt_tokens else None
        if reason is None:
            kept.append(paragraph)
        counts[reason or "kept"] += 1
    if not kept:
        found = ", ".join(f"{reason} {counts[reason]}" for reason in SELECTION_REASONS if counts[reason])
        limit = f", prompts of at most {max_prompt_tokens}" if max_prompt_tokens is not None else ""
        raise CorpusError(
            f"None of {len(paragraphs)} paragraphs can be played ({found or 'the corpus is empty'}). Wanted: "
            f"{min_tokens} to {max_tokens} tokens{limit}, without {', '.join(RESERVED)} or the tokenizer's end tokens. "
            "Set --min-paragraph-tokens, --max-paragraph-tokens and --max-prompt-tokens to fit the text, or split it "
            "into paragraphs."
        )
    return kept, {"kept": len(kept), **{reason: counts[reason] for reason in SELECTION_REASONS if counts[reason]}}


def _reason(text: str, tokenizer: Tokenizer, min_tokens: int, max_tokens: int) -> str | None:
    if any(word in text for word in RESERVED):
        return "reserved_text"
    return reject_reason(text, tokenizer.encode(text), tokenizer, min_tokens, max_tokens)


def reject_reason(text: str, ids: Sequence[int], tokenizer: Encoder, min_tokens: int, max_tokens: int) -> str | None:
    """Why a text of tokens `ids` cannot be played, but for its prompt; None where it can."""
    if any(word in text for word in RESERVED):
        return "reserved_text"
    if len(ids) < min_tokens:
        return "too_short"
    if len(ids) > max_tokens:
        return "too_long"
    # Text that spells an end token would end the prompt in the middle.
    return "special_token" if set(ids) & set(tokenizer.eos_token_ids) else None
