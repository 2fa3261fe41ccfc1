"""Any layout's weights as whole Hugging Face tensors, one parameter at a time, on one rank or on all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_pz.errors import ModelError
from megatron_pz.models.names import Experts
from megatron_pz.models.quantized import plain
from megatron_pz.models.shards import Shard, complete_weights, shards_of

Names = tuple[str, ...]


def iterate_hf_tensors(
    chunks: Sequence[torch.nn.Module], group: Any = None, to_rank: int | None = 0
) -> Iterator[tuple[str, Tensor]]:
    """(HF name, whole tensor [...] in its dtype) of every weight that `group` holds, on one rank or on each; nothing on its
    other ranks, which must iterate too.

    Never more than one parameter is whole at a time. Tensors are detached.

    Args:
        chunks: this rank's model chunks, wrapped or not.
        group: all ranks, or those of a pipeline stage; needed with more than one rank. Pieces travel as it does: by gloo
            through host memory, where the tensors are then, and by NCCL from device to device.
        to_rank: the rank of the world that gets the tensors, one of `group`; None: every rank of it does.

    Raises:
        ModelError: the ranks together lack a piece of a tensor; on all of them.
    """
    complete_weights(chunks)
    shards = {shard.hf_names: shard for shard in shards_of(chunks) if shard.entry.is_exported}
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        for shard in shards.values():
            yield from _whole(shard, [plain(shard.parameter)])
        return
    device = next(iter(shards.values())).parameter.device if dist.get_backend(group) == "nccl" else torch.device("cpu")
    for names, pieces in _pieces(shards, group).items():
        recipe, found = next(iter(pieces.values())), sorted(piece.rank for piece in pieces.values())
        if found != list(range(recipe.size)):
            raise ModelError(f"{names[0]}: shards {found} of {recipe.size} were found.")
        moved = {
            piece.rank: _moved(shards.get(names), piece.parameter, holder, to_rank, group, device)
            for holder, piece in sorted(pieces.items())
        }
        if to_rank in (None, dist.get_rank()):
            yield from _whole(recipe, [whole for _, whole in sorted(moved.items()) if whole is not None])


def _pieces(shards: Mapping[Names, Shard], group: Any) -> dict[Names, dict[int, Shard]]:
    """Of every parameter in `group`: its pieces, each without its numbers, by the rank of the world that sends it."""
    own = [_described(shard) for shard in shards.values() if _is_first_replica(shard)]
    everywhere: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everywhere, (dist.get_rank(), own), group=group)
    found: dict[Names, dict[int, Shard]] = {}
    for holder, pieces in everywhere:
        for piece in pieces:
            found.setdefault(piece.hf_names, {})[holder] = piece
    return found


def _moved(
    own: Shard | None, like: Tensor, holder: int, to_rank: int | None, group: Any, device: torch.device
) -> Tensor | None:
    """The piece that `holder` has: on `to_rank`, or on every rank; None elsewhere.

    Args:
        own: on `holder`, its shard.
        like: of the piece's shape and dtype.
    """
    rank = dist.get_rank()
    if rank == holder:
        assert own is not None
        piece = plain(own.parameter).to(device, like.dtype).contiguous()
    elif to_rank in (None, rank):
        piece = torch.empty(like.shape, dtype=like.dtype, device=device)
    else:
        return None
    data = piece.view(-1).view(torch.uint8)  # gloo does not know every dtype
    if to_rank is None:
        dist.broadcast(data, holder, group=group)
    elif holder != to_rank:
        if rank == holder:
            dist.send(data, to_rank, group=group)
        else:
            dist.recv(data, holder, group=group)
    return piece


def _described(shard: Shard) -> Shard:
    """`shard` without its numbers: how its pieces are put together, and the parameter's shape and dtype."""
    like = torch.empty(shard.parameter.shape, dtype=shard.parameter.dtype, device="meta")
    return Shard(shard.entry, shard.hf_names, like, shard.rank, shard.size, shard.shape)


def _is_first_replica(shard: Shard) -> bool:
    """One rank of those that hold the same piece sends it."""
    if isinstance(shard.entry.mapping, Experts):
        return parallel_state.get_expert_data_parallel_rank() == 0
    return parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0


def _whole(shard: Shard, pieces: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
    yield from zip(shard.hf_names, shard.entry.mapping.to_hf(pieces, shard.shape), strict=True)
