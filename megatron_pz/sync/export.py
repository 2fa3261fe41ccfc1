"""Any layout's weights as whole Hugging Face tensors, one parameter at a time, on one rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_pz.errors import ModelError
from megatron_pz.models.names import Experts
from megatron_pz.models.quantized import plain
from megatron_pz.models.shards import Shard, complete_weights, shards_of


def iterate_hf_tensors(
    chunks: Sequence[torch.nn.Module], group: Any = None, to_rank: int | None = 0
) -> Iterator[tuple[str, Tensor]]:
    """(HF name, whole tensor [...] in its dtype) of every weight that `group` holds, on one rank; nothing on others, which must
    iterate too.

    Never more than one parameter is whole at a time. Tensors are detached and on the CPU where there are several ranks.

    Args:
        chunks: this rank's model chunks, wrapped or not.
        group: gloo group of all ranks, or of a pipeline stage; needed with more than one rank.
        to_rank: the rank of the world that gets the tensors, one of `group`; None: every rank of it does.

    Raises:
        ModelError: the ranks together lack a piece of a tensor.
    """
    complete_weights(chunks)
    shards = {shard.hf_names: shard for shard in shards_of(chunks) if shard.entry.is_exported}
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        for shard in shards.values():
            yield from _whole(shard, [plain(shard.parameter)])
        return
    gets_them = to_rank in (None, dist.get_rank())
    held: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(held, list(shards), group=group)
    for names in dict.fromkeys(names for rank_names in held for names in rank_names):
        own = shards.get(names)
        sent = (_recipe(own), own.rank, plain(own.parameter).cpu()) if own and _is_first_replica(own) else None
        pieces: list[Any] | None = [None] * len(held) if gets_them else None
        if to_rank is None:
            dist.all_gather_object(pieces, sent, group=group)
        else:
            dist.gather_object(sent, pieces, dst=to_rank, group=group)
        if pieces is None:
            continue
        found = {rank: (recipe, piece) for recipe, rank, piece in filter(None, pieces)}
        recipe = next(iter(found.values()))[0]
        if sorted(found) != list(range(recipe.size)):
            raise ModelError(f"{names[0]}: shards {sorted(found)} of {recipe.size} were found.")
        yield from _whole(recipe, [found[rank][1] for rank in range(recipe.size)])


def _is_first_replica(shard: Shard) -> bool:
    """One rank of those that hold the same piece sends it."""
    if isinstance(shard.entry.mapping, Experts):
        return parallel_state.get_expert_data_parallel_rank() == 0
    return parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0


def _recipe(shard: Shard) -> Shard:
    """`shard` without its numbers: how its pieces are put together."""
    return Shard(shard.entry, shard.hf_names, torch.empty(0), shard.rank, shard.size, shard.shape)


def _whole(shard: Shard, pieces: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
    yield from zip(shard.hf_names, shard.entry.mapping.to_hf(pieces, shard.shape), strict=True)
