"""What this rank writes of a checkpoint, and what is read into it: weights and the optimizer's state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, is_main_replica
from megatron.core.optimizer import MegatronOptimizer

from megatron_pz.checkpoint import optimizer_state
from megatron_pz.checkpoint.extra_state import drop_absent_states, load_state
from megatron_pz.checkpoint.pieces import Fact, PieceReader
from megatron_pz.checkpoint.places import Saved, place_of, sharded_pieces
from megatron_pz.checkpoint.writer import Piece
from megatron_pz.models.quantized import fill, plain
from megatron_pz.models.shards import unwrap


def pieces_to_save(chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer) -> list[Piece]:
    """Every piece that this rank is the one to write, as views of what is there now."""
    found: list[Piece] = []
    for one in nested_values(_described(chunks)):
        if not is_main_replica(one.replica_id):
            continue
        if isinstance(one, ShardedObject):
            found.append((one.unique_key, one.data))
        else:
            for piece in sharded_pieces(one):
                place = place_of(piece)
                found.append((place, plain(piece.data.detach()).reshape(place.shape)))
    found += optimizer_state.pieces_to_save(optimizer, _saved(chunks))
    return found


def load_model(chunks: Sequence[torch.nn.Module], shards: Path) -> None:
    """Fill the chunks with the weights in `shards`, written under any layout. Collective."""
    wanted = _described(chunks)
    drop_absent_states(wanted, shards)
    loaded = dist_checkpointing.load(wanted, str(shards))
    for index, chunk in enumerate(chunks):
        policy, state = unwrap(chunk), loaded[f"model{index}"]
        load_state(policy, state)
        for name, parameter in policy.named_parameters():
            fill(parameter, state[name])


def load_optimizer(
    chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer, shards: Path, facts: Mapping[str, Any]
) -> None:
    """Fill the optimizer of the chunks, which have their weights.

    Args:
        facts: the checkpoint's manifest.

    Raises:
        CheckpointError: there is no optimizer state, or a part is missing.
    """
    with closing(PieceReader(shards)) as reader:
        known = facts.get("optimizer")
        step = known["step"] if known else optimizer_state.saved_step(_common(shards))
        optimizer_state.load(optimizer, _saved(chunks), reader, step)


def uncovered(facts: Sequence[Fact]) -> list[str]:
    """Keys of tensors whose pieces, of all ranks, do not have as many numbers as the whole: a fault of ours."""
    counted: dict[str, list[int]] = {}
    for key, offset, shape, whole, *_ in facts:
        if offset is not None:
            size = counted.setdefault(key, [0, torch.Size(whole).numel()])
            size[0] += torch.Size(shape).numel()
    return sorted(key for key, (found, wanted) in counted.items() if found != wanted)


def _described(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """Megatron's description of the weights, as pieces of whole tensors."""
    return {f"model{index}": unwrap(chunk).sharded_state_dict() for index, chunk in enumerate(chunks)}


def _saved(chunks: Sequence[torch.nn.Module]) -> dict[int, Saved]:
    return optimizer_state.describe(_described(chunks))


def _common(shards: Path) -> Any:
    return dist_checkpointing.load_common_state_dict(str(shards))
