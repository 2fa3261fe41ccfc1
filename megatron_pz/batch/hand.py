"""What a data-parallel rank is dealt of an update: its own samples, small enough to be sent, and which go together.

Micro-batches are made where they are used: they are three times as large, and rank 0 would make those of every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from megatron_pz.batch.packing import micro_batch
from megatron_pz.types import MicroBatch, Role, Sample, UpdatePlan


@dataclass(frozen=True, slots=True, eq=False)
class Dealt:
    """A sample on its way to a rank; 12 bytes a token where no experts are told."""

    token_ids: np.ndarray  # int32 [length]
    loss_weights: np.ndarray  # float32 [length], scaled over the whole update
    rollout_log_probs: np.ndarray  # float32 [length]
    advantage: float
    role: Role | None
    routed_experts: np.ndarray | None  # int16 [length - 1, layers, top_k]


@dataclass(frozen=True, slots=True, eq=False)
class Hand:
    """A rank's part of an update."""

    samples: Mapping[int, Dealt]  # by index among those of the update
    bins: tuple[tuple[int, ...], ...]  # indices that share a micro-batch; an empty one is padding only
    num_tokens: int  # trained, over all ranks
    num_samples: int  # over all ranks
    dp_rank: int
    dp_size: int

    def micro_batches(self, *, align: int = 1, context_size: int = 1) -> tuple[MicroBatch, ...]:
        """Of this rank.

        Args:
            align: divisor of each context-parallel rank's tokens.
            context_size: context-parallel ranks.
        """
        weights = {index: sample.loss_weights for index, sample in self.samples.items()}
        return tuple(
            micro_batch(self.samples, weights, indices, align=align, context_size=context_size) for indices in self.bins
        )

    def plan(self, *, align: int = 1, context_size: int = 1) -> UpdatePlan:
        """The update's plan with this rank's micro-batches only: an empty tuple stands in the place of the others'."""
        mine = self.micro_batches(align=align, context_size=context_size)
        ranks = tuple(mine if rank == self.dp_rank else () for rank in range(self.dp_size))
        return UpdatePlan(ranks, self.num_tokens, self.num_samples)


def dealt(sample: Sample, scale: float) -> Dealt:
    """`sample` with its loss weights times `scale`."""
    weights = np.array(sample.loss_weights, np.float64) * scale
    weights[:1] = 0
    return Dealt(
        token_ids=np.array(sample.token_ids, np.int32),
        loss_weights=weights.astype(np.float32),
        rollout_log_probs=np.array(sample.rollout_log_probs, np.float32),
        advantage=sample.advantage,
        role=sample.role,
        routed_experts=sample.routed_experts,
    )
