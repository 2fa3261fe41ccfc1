"""The fixed questions that a run is scored on."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_pz.config.schema import Config
from megatron_pz.corpus.playable import read_playable
from megatron_pz.errors import CorpusError
from megatron_pz.evaluate.fixed_masks import FixedMasks, fixed_set, shuffled_set
from megatron_pz.game.prompts import Templates
from megatron_pz.tasks.ask import Asker
from megatron_pz.types import Paragraph, Tokenizer


def fixed_sets(
    config: Config, tokenizer: Tokenizer, templates: Templates, paragraphs: Sequence[Paragraph]
) -> list[tuple[FixedMasks, Asker]]:
    """Masks of the corpus, the same shuffled and those of held-out text where the settings ask for them.

    Raises:
        CorpusError: held-out text cannot be read or played.
    """
    asker = Asker(config.task, config.engine, tokenizer, templates)
    sets = [(fixed_set("fixed_masks", paragraphs, asker, config.evaluate, config.task), asker)]
    if config.evaluate.probe_shuffled and (probe := shuffled_set(sets[0][0], asker, config.evaluate)).masks:
        sets.append((probe, asker))
    if config.corpus.held_out_path:
        try:
            held_out, _ = read_playable(
                config.corpus.held_out_path, config, tokenizer, lambda text: asker.mask_prompt(text).ids
            )
        except CorpusError as error:
            raise CorpusError(f"--held-out-path: {error} Left empty, none is scored.") from error
        sets.append((fixed_set("held_out", held_out, asker, config.evaluate, config.task), asker))
    return sets
