"""The parameters of this rank, each with its line of the name table and its place in the whole model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_pz.errors import ModelError
from megatron_pz.models.names import Entry, Experts, TensorShape, find_entry
from megatron_pz.models.policy_model import PolicyModel
from megatron_pz.models.quantized import fill


@dataclass(frozen=True, eq=False)
class Shard:
    """One parameter of this rank. `hf_names` name the whole tensors it is a piece of."""

    entry: Entry
    hf_names: tuple[str, ...]
    parameter: Tensor  # [...] of `model.params_dtype`, or in FP8
    rank: int  # its place among the ranks that share the tensor
    size: int  # how many they are
    shape: TensorShape

    def fill(self, read: Callable[[str], Tensor]) -> None:
        """Copy this rank's piece of the tensors [*hf_shape] that `read` returns into the parameter, in the parameter's dtype.

        Raises:
            ModelError: a tensor is not of the shape that the parameter needs.
        """
        tensors = [read(name) for name in self.hf_names]
        found, wanted = [tuple(tensor.shape) for tensor in tensors], self.hf_shapes()
        if found != wanted:
            faults = zip(self.hf_names, found, wanted, strict=True)
            raise ModelError(
                "; ".join(f"{name} has shape {f}, config.json makes it {w}" for name, f, w in faults if f != w) + "."
            )
        piece = self.entry.mapping.to_shard(tensors, self.shape, self.rank, self.size)
        fill(self.parameter, piece)

    def hf_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the whole HF tensors."""
        piece = torch.empty(self.parameter.shape, device="meta")
        return [tuple(tensor.shape) for tensor in self.entry.mapping.to_hf([piece] * self.size, self.shape)]


def unwrap(chunk: torch.nn.Module) -> PolicyModel:
    """The policy inside Megatron's wrappers (DistributedDataParallel, Float16Module)."""
    inner: Any = chunk
    while hasattr(inner, "module"):
        inner = inner.module
    return cast(PolicyModel, inner)


def complete_weights(chunks: Sequence[torch.nn.Module]) -> None:
    """Have every rank hold the weights of the last update, before they are read otherwise than by a training forward.

    With `[ddp] overlap_param_gather` the distributed optimizer leaves each rank with its own part, and the rest comes along
    with the next forward. Collective.
    """
    for chunk in chunks:
        if getattr(getattr(chunk, "ddp_config", None), "overlap_param_gather", False):
            cast("Any", chunk).start_param_sync(force_sync=True)


def shards_of(chunks: Sequence[torch.nn.Module]) -> list[Shard]:
    """Every parameter of this rank's model chunks, in the model's order.

    Raises:
        ModelError: a parameter has no line in the family's table.
    """
    return [shard for chunk in chunks for shard in _shards_of_stage(unwrap(chunk))]


def _shards_of_stage(model: PolicyModel) -> list[Shard]:
    entries = model.family.names(model.hf_config)
    layers = [layer.layer_number - 1 for layer in model.decoder.layers]
    experts_per_rank = (model.config.num_moe_experts or 0) // model.config.expert_model_parallel_size
    found = []
    for name, parameter in model.named_parameters():
        line = find_entry(entries, name)
        if line is None:
            raise ModelError(f"parameter {name} has no line in the name table of {model.family.model_type!r}.")
        entry, layer, expert = line
        if layer is not None:
            layer = layers[layer]
        if expert is not None:
            expert += parallel_state.get_expert_model_parallel_rank() * experts_per_rank
        if isinstance(entry.mapping, Experts):
            rank = parallel_state.get_expert_tensor_parallel_rank()
            size = parallel_state.get_expert_tensor_parallel_world_size()
        else:
            rank = parallel_state.get_tensor_model_parallel_rank()
            size = parallel_state.get_tensor_model_parallel_world_size()
        found.append(Shard(entry, entry.hf_names(layer, expert), parameter, rank, size, model.tensor_shape))
    return found
