"""A whole model as names, shapes and places in a checkpoint, without its numbers: one process, no memory.

Megatron itself says where a parameter stands in a checkpoint (its sharded state dict), the family's name table which
Hugging Face tensors it is made of. Both are asked of the trainer's own model, built on the meta device.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch import Tensor

from megatron_pz.checkpoint.places import Place, Saved, place_of, sharded_pieces
from megatron_pz.config.schema import Config, ModelConfig
from megatron_pz.models.family import HfConfig
from megatron_pz.models.names import Direct, Experts, GatedMLP, Vocabulary
from megatron_pz.models.policy import build_policy
from megatron_pz.models.shards import Shard, shards_of
from megatron_pz.platform.meta import MetaPlatform, on_meta


@dataclass(frozen=True, eq=False)
class Parameter:
    """One parameter of the whole model."""

    shard: Shard  # the only one; without numbers
    saved: Saved

    def places(self) -> list[Place]:
        """Where its pieces stand in a checkpoint."""
        return [place_of(piece) for piece in sharded_pieces(self.saved)]

    @cached_property
    def is_saved_as_hf(self) -> bool:
        """Whether its pieces are its Hugging Face tensors, in their order: none needs to be put together."""
        mapping = self.shard.entry.mapping
        mapping = mapping.inner if isinstance(mapping, Experts) else mapping
        sizes = [math.prod(shape) for shape in self.shard.hf_shapes()]
        return (
            isinstance(mapping, Direct | GatedMLP | Vocabulary)
            and [math.prod(one.shape) for one in self.places()] == sizes
        )

    def cut(self, value: Tensor) -> list[tuple[Place, Tensor]]:
        """`value` of the whole parameter, [...] of any dtype, as its pieces [*place.shape]."""
        if isinstance(self.saved, ShardedTensor):
            pieces = [value]
        else:
            pieces = [piece.data for piece in sharded_pieces(dataclasses.replace(self.saved, data=value))]
        return [(place, piece.reshape(place.shape)) for piece, place in zip(pieces, self.places(), strict=True)]

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """The whole parameter, [...] in their dtype, from the pieces of `places`: the inverse of `cut`."""
        shape = self.shard.parameter.shape
        if isinstance(self.saved, ShardedTensorFactory):
            flat = [piece.reshape(piece.shape[-len(shape) :]) for piece in pieces]
            return torch.as_tensor(self.saved.merge_fn(flat))
        (piece,) = pieces
        return piece.reshape(piece.shape[-len(shape) :])

    def from_hf(self, tensors: Sequence[Tensor]) -> Tensor:
        """The whole parameter, [...] in their dtype, from its Hugging Face tensors."""
        return self.shard.entry.mapping.to_shard(tensors, self.shard.shape, 0, 1)

    def to_hf(self, value: Tensor) -> list[Tensor]:
        """Its Hugging Face tensors, [...] in its dtype, from the whole parameter."""
        return self.shard.entry.mapping.to_hf([value], self.shard.shape)


@dataclass(frozen=True)
class Skeleton:
    """A model's parameters, in its own order, and the names of what a checkpoint holds beside tensors."""

    parameters: tuple[Parameter, ...]
    objects: tuple[str, ...]

    def hf_names(self) -> list[str]:
        """Of every Hugging Face tensor, parameter by parameter."""
        return [name for parameter in self.parameters for name in parameter.shard.hf_names]


def skeleton(hf_config: HfConfig, make_vocab_size_divisible_by: int) -> Skeleton:
    """The skeleton of the model that config.json describes; the CPU platform must be installed.

    Raises:
        ModelError: the family is unknown, or config.json is not as it needs.
    """
    config = Config(model=ModelConfig(make_vocab_size_divisible_by=make_vocab_size_divisible_by))
    with _alone(), on_meta():
        model = build_policy(hf_config, config, MetaPlatform())
        saved = model.sharded_state_dict()
        names = [name for name, _ in model.named_parameters()]
        parameters = [Parameter(shard, saved[name]) for name, shard in zip(names, shards_of([model]), strict=True)]
    objects = [value.unique_key for value in saved.values() if isinstance(value, ShardedObject)]
    return Skeleton(tuple(parameters), tuple(objects))


@contextmanager
def _alone() -> Iterator[None]:
    """Megatron's groups of a world of one process, where they are not up already."""
    if parallel_state.model_parallel_is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(0, force_reset_rng=True)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
