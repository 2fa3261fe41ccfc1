"""From files to the paragraphs that a run plays: read, then selected."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_pz.config.schema import Config
from megatron_pz.corpus.paragraphs import select
from megatron_pz.corpus.questions import read_questions
from megatron_pz.corpus.reader import read_paragraphs
from megatron_pz.errors import CorpusError
from megatron_pz.types import Paragraph, Tokenizer


def read_playable(
    path: str, config: Config, tokenizer: Tokenizer, prompt_ids: Callable[[str], Sequence[int]]
) -> tuple[list[Paragraph], dict[str, int]]:
    """Paragraphs of `path` that can be played, and how many were read, kept and left out.

    Args:
        prompt_ids: of the first prompt about a text (`Task.prompt_ids`).

    Raises:
        CorpusError: the file cannot be read, or nothing of it can be played.
    """
    read_file = read_questions if config.task.task == "rlvr" else read_paragraphs
    found, read = read_file(path, skip_bad_lines=config.corpus.skip_bad_lines)
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
