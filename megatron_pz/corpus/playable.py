"""From files to the paragraphs that a run plays: read, then selected. A store's paragraphs stay on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from megatron_pz.config.schema import Config
from megatron_pz.corpus.paragraphs import reject_reason, select
from megatron_pz.corpus.questions import read_questions
from megatron_pz.corpus.reader import read_paragraphs
from megatron_pz.corpus.store import CorpusStore, is_store, tokenizer_digest
from megatron_pz.errors import CorpusError
from megatron_pz.types import Paragraph, Tokenizer


def read_texts(path: str, config: Config) -> tuple[Sequence[Paragraph], dict[str, int]]:
    """All that `path` holds, and how many were read and left out; it wants no tokenizer.

    Raises:
        CorpusError: the file cannot be read.
    """
    if is_store(path):
        store = CorpusStore(path)
        return store, {"read": len(store)}
    read_file = read_questions if config.task.task == "rlvr" else read_paragraphs
    return read_file(path, skip_bad_lines=config.corpus.skip_bad_lines)


def read_playable(
    path: str, config: Config, tokenizer: Tokenizer, prompt_ids: Callable[[str], Sequence[int]]
) -> tuple[Sequence[Paragraph], dict[str, int]]:
    """Paragraphs of `path` that can be played, and how many were read, kept and left out.

    Args:
        prompt_ids: of the first prompt about a text (`Task.prompt_ids`).

    Raises:
        CorpusError: the file cannot be read, or nothing of it can be played.
    """
    found, read = read_texts(path, config)
    if isinstance(found, CorpusStore):
        return _of_store(found, config, tokenizer, prompt_ids)
    try:
        kept, selected = select(
            found,
            tokenizer,
            config.corpus.min_paragraph_tokens,
            config.corpus.max_paragraph_tokens,
            prompt_ids=prompt_ids,
            max_prompt_tokens=config.task.max_prompt_tokens,
        )
    except CorpusError as error:
        raise CorpusError(f"{path}: {error}") from error
    return kept, read | selected


def longest(paragraphs: Sequence[Paragraph]) -> Paragraph:
    """The one with most tokens by a store's own count; of others, with most characters."""
    if isinstance(paragraphs, CorpusStore):
        tokens = paragraphs.tokens if paragraphs.rows is None else paragraphs.tokens[paragraphs.rows]
        return paragraphs[int(np.argmax(tokens))]
    return max(paragraphs, key=lambda paragraph: len(paragraph.text))


MARGIN = 32
"""Tokens that a prompt may have beyond its frame and its text: a text next to other text is cut a little otherwise."""


def _of_store(
    store: CorpusStore, config: Config, tokenizer: Tokenizer, prompt_ids: Callable[[str], Sequence[int]]
) -> tuple[CorpusStore, dict[str, int]]:
    """The playable rows. Under the store's own tokenizer its lengths are believed, and only texts whose prompt comes near
    the limit are tokenized."""
    low, high = config.corpus.min_paragraph_tokens, config.corpus.max_paragraph_tokens
    counts = {"read": len(store)}
    if store.head["tokenizer_digest"] == tokenizer_digest(tokenizer):
        lengths = np.asarray(store.tokens)
        reasons = {"too_short": lengths < low, "too_long": lengths > high}
    else:
        lengths = np.zeros(len(store), np.uint32)
        reasons = {name: np.zeros(len(store), bool) for name in ("too_short", "too_long", "special_token")}
        for row, paragraph in enumerate(store):
            ids = tokenizer.encode(paragraph.text)
            lengths[row] = len(ids)
            if (reason := reject_reason(paragraph.text, ids, tokenizer, low, high)) is not None:
                reasons.setdefault(reason, np.zeros(len(store), bool))[row] = True
    kept = ~np.logical_or.reduce(list(reasons.values()))
    limit = config.task.max_prompt_tokens
    if kept.any():
        longest = int(np.flatnonzero(kept)[np.argmax(lengths[kept])])
        frame = len(prompt_ids(store[longest].text)) - int(lengths[longest])
        long = np.zeros(len(store), bool)
        for near in np.flatnonzero(kept & (lengths.astype(np.int64) + frame + MARGIN > limit)):
            long[near] = len(prompt_ids(store[int(near)].text)) > limit
        reasons["prompt_too_long"] = long
        kept &= ~long
    left = {name: int(where.sum()) for name, where in reasons.items() if where.any()}
    if not kept.any():
        raise CorpusError(
            f"{store.folder}: none of {len(store)} paragraphs can be played ({left}). Set --min-paragraph-tokens, "
            "--max-paragraph-tokens and --max-prompt-tokens to fit it."
        )
    return CorpusStore(store.folder, np.flatnonzero(kept).astype(np.uint32)), counts | {"kept": int(kept.sum())} | left
