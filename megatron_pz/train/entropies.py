"""How unsure the policy is of each token of a paragraph: what `entropy_ntp` chooses its questions by."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from megatron_pz.batch.schedule import plan_update
from megatron_pz.config.schema import Config
from megatron_pz.train.deal import divisors
from megatron_pz.train.step import Trainer
from megatron_pz.types import Paragraph, Sample, Tokenizer


def with_entropies(
    paragraphs: Sequence[Paragraph], tokenizer: Tokenizer, trainer: Trainer, config: Config
) -> list[Paragraph]:
    """`paragraphs` with `token_entropies` under the trainer's present weights. Collective; the same on every rank.

    The first token's entropy is 0 where the tokenizer puts nothing in front of a text.
    """
    bos = tuple(tokenizer.bos_token_ids)
    texts = [tuple(tokenizer.encode(paragraph.text)) for paragraph in paragraphs]
    layout = divisors(config)
    plan = plan_update(
        [_sample((*bos, *ids)) for ids in texts],
        max_tokens=config.train.max_tokens_per_micro_batch,
        dp_size=trainer.parallel.dp_size,
        align=layout["align"],
        context_size=layout["context_size"],
        count_multiple=layout["count_multiple"],
    )
    mine = plan.micro_batches[trainer.parallel.dp_rank]
    own: dict[int, list[float]] = {}
    for batch, row in zip(mine, trainer.entropies(mine), strict=True):
        for place, index in enumerate(batch.sample_indices):
            if index >= 0:
                start = int(batch.cu_seqlens[place])
                length = len(bos) + len(texts[index])
                # Position t speaks of the token behind it.
                own[index] = [0.0, *row[start : start + length - 1].tolist()][len(bos) :]
    everyone: list[Any] = [own]
    if trainer.parallel.world_size > 1:
        everyone = [None] * trainer.parallel.world_size
        dist.all_gather_object(everyone, own, group=trainer.parallel.control_group)
    found = {index: entropies for part in everyone for index, entropies in part.items()}
    return [
        dataclasses.replace(paragraph, token_entropies=tuple(found[index]))
        for index, paragraph in enumerate(paragraphs)
    ]


def _sample(ids: tuple[int, ...]) -> Sample:
    """Every token of a text is asked about but the first."""
    return Sample(ids, (0.0, *(1.0,) * (len(ids) - 1)), (0.0,) * len(ids), 1.0, None, "entropies")
