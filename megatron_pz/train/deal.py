"""Rank 0's samples become every rank's micro-batches, and each rank is handed only its own."""

from __future__ import annotations

import pickle
import random
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_pz.batch.balance import Cost
from megatron_pz.batch.hand import Hand
from megatron_pz.batch.schedule import hands
from megatron_pz.config.schema import Config
from megatron_pz.models.family import HfConfig
from megatron_pz.models.flops import forward_flops
from megatron_pz.models.transformer import token_multiple
from megatron_pz.train.parallel import Parallel
from megatron_pz.types import Sample, UpdatePlan


def deal(
    samples: Sequence[Sample] | None, config: Config, parallel: Parallel, step: int, hf_config: HfConfig
) -> list[UpdatePlan]:
    """Plans of the step's updates (`train.updates_per_batch` of them), this rank's micro-batches only.

    Args:
        samples: the step's trainable samples on rank 0, None elsewhere.
        hf_config: of the model, by whose work the ranks' shares are balanced.

    Returns:
        The same number of plans on every rank; none where there is nothing to learn from. In each, the micro-batches of
        other data-parallel ranks are left out (an empty tuple stands in their place).
    """
    layout = divisors(config)
    mine = scatter(_dealt(samples, config, parallel, step, hf_config) if parallel.is_rank0 else None, parallel)
    return [hand.plan(align=layout["align"], context_size=layout["context_size"]) for hand in mine]


def _dealt(
    samples: Sequence[Sample] | None, config: Config, parallel: Parallel, step: int, hf_config: HfConfig
) -> list[list[Hand]]:
    """By data-parallel rank, a hand for each update."""
    assert samples is not None, "rank 0 deals what it has played"
    shuffled, layout = list(samples), divisors(config)
    random.Random(f"{config.train.seed}/{step}/deal").shuffle(shuffled)  # roles mixed over updates (docs/paper.md 2.9)
    num_updates = min(config.train.updates_per_batch, len(shuffled))
    by_update = [
        hands(
            shuffled[i::num_updates],
            max_tokens=config.train.max_tokens_per_micro_batch,
            dp_size=parallel.dp_size,
            loss_aggregation=config.train.loss_aggregation,
            context_size=layout["context_size"],
            count_multiple=layout["count_multiple"],
            cost=Cost(*forward_flops(hf_config)),
        )
        for i in range(num_updates)
    ]
    return [[of_update[rank] for of_update in by_update] for rank in range(parallel.dp_size)]


def divisors(config: Config) -> dict[str, int]:
    """What the layout divides micro-batches and their number by: `align`, `context_size` and `count_multiple` of `plan_update`."""
    sizes = config.parallel
    group = config.transformer.get("microbatch_group_size_per_vp_stage", sizes.pipeline_model_parallel_size)
    return {
        "align": token_multiple(config),
        "context_size": sizes.context_parallel_size,
        "count_multiple": group if sizes.virtual_pipeline_model_parallel_size > 1 else 1,
    }


def scatter(by_dp_rank: list[list[Hand]] | None, parallel: Parallel) -> list[Hand]:
    """This rank's hands, of those that rank 0 has for every data-parallel rank.

    Rank 0 packs each hand once, however many ranks share it, and sends every rank as many bytes as the largest has.
    """
    if parallel.world_size == 1:
        return by_dp_rank[0] if by_dp_rank else []
    group, packed = parallel.control_group, []
    if by_dp_rank is not None:
        packed = [pickle.dumps(own, pickle.HIGHEST_PROTOCOL) for own in by_dp_rank]
    most = torch.tensor(max(map(len, packed), default=0))
    dist.broadcast(most, src=0, group=group)
    received = torch.empty(int(most), dtype=torch.uint8)
    sent = None
    if by_dp_rank is not None:
        padded = [torch.frombuffer(bytearray(one.ljust(int(most), b"\0")), dtype=torch.uint8) for one in packed]
        sent = [padded[rank] for rank in parallel.dp_rank_of]
    dist.scatter(received, sent, src=0, group=group)
    mine: list[Hand] = pickle.loads(received.numpy().tobytes())
    return mine
