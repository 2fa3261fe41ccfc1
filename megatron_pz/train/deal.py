"""Rank 0's samples become every rank's micro-batches, and each rank is handed only its own."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch.distributed as dist

from megatron_pz.batch.schedule import plan_update
from megatron_pz.config.schema import Config
from megatron_pz.train.parallel import Parallel
from megatron_pz.types import Sample, UpdatePlan


def deal(samples: Sequence[Sample] | None, config: Config, parallel: Parallel, step: int) -> list[UpdatePlan]:
    """Plans of the step's updates (`train.updates_per_batch` of them), this rank's micro-batches only.

    Args:
        samples: the step's trainable samples on rank 0, None elsewhere.

    Returns:
        The same number of plans on every rank; none where there is nothing to learn from. In each, the micro-batches of
        other data-parallel ranks are left out (an empty tuple stands in their place).
    """
    if not parallel.is_rank0:
        return _scatter(None, parallel)
    assert samples is not None, "rank 0 deals what it has played"
    shuffled = list(samples)
    random.Random(f"{config.train.seed}/{step}/deal").shuffle(shuffled)  # roles mixed over updates (docs/paper.md 2.9)
    num_updates = min(config.train.updates_per_batch, len(shuffled))
    plans = [
        plan_update(
            shuffled[i::num_updates],
            max_tokens=config.train.max_tokens_per_micro_batch,
            dp_size=parallel.dp_size,
            loss_aggregation=config.train.loss_aggregation,
            **divisors(config),
        )
        for i in range(num_updates)
    ]
    return _scatter(plans, parallel)


def divisors(config: Config) -> dict[str, int]:
    """What the layout divides micro-batches and their number by: `align`, `context_size` and `count_multiple` of `plan_update`."""
    sizes = config.parallel
    group = config.transformer.get("microbatch_group_size_per_vp_stage", sizes.pipeline_model_parallel_size)
    return {
        "align": sizes.tensor_model_parallel_size if sizes.sequence_parallel else 1,
        "context_size": sizes.context_parallel_size,
        "count_multiple": group if sizes.virtual_pipeline_model_parallel_size > 1 else 1,
    }


def _scatter(plans: list[UpdatePlan] | None, parallel: Parallel) -> list[UpdatePlan]:
    if parallel.world_size == 1:
        return plans or []
    hands = None
    if plans is not None:
        by_dp_rank = [[only(plan, dp_rank) for plan in plans] for dp_rank in range(parallel.dp_size)]
        hands = [by_dp_rank[dp_rank] for dp_rank in parallel.dp_rank_of]
    mine: list[list[UpdatePlan]] = [[]]
    dist.scatter_object_list(mine, hands, src=0, group=parallel.control_group)
    return mine[0]


def only(plan: UpdatePlan, dp_rank: int) -> UpdatePlan:
    """`plan` with the micro-batches of one data-parallel rank."""
    kept = tuple(batches if rank == dp_rank else () for rank, batches in enumerate(plan.micro_batches))
    return replace(plan, micro_batches=kept)
