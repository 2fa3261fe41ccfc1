"""How Hugging Face tensors become Megatron parameters and back: one mapping object serves both directions.

A mapping turns the whole HF tensors of one parameter into one rank's shard (`to_shard`), and all the shards back into
the HF tensors (`to_hf`); the second undoes the first bit for bit. An `Entry` gives a mapping its Megatron names, with a
spelling for the local layers and one for Transformer Engine's, which keep norms inside the linear they precede.
Names hold `{layer}` (counted over the whole model) and `{expert}` (over all experts of a layer).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor

Scope = Literal["model", "layer", "dense", "moe"]


@dataclass(frozen=True)
class TensorShape:
    """The sizes that mappings need."""

    num_query_groups: int
    kv_channels: int  # size of one attention head
    vocab_size: int  # rows of the HF embedding
    padded_vocab_size: int  # rows of Megatron's


class Mapping(Protocol):
    """One Megatron parameter and its HF tensors."""

    @property
    def hf_names(self) -> tuple[str, ...]:
        """Names of the HF tensors, with `{layer}` and `{expert}` where they have one."""
        ...

    def to_shard(self, tensors: Sequence[Tensor], shape: TensorShape, rank: int, size: int) -> Tensor:
        """Shard `rank` of `size` of the parameter, [...] in their dtype, from its whole HF tensors in the order of `hf_names`."""
        ...

    def to_hf(self, shards: Sequence[Tensor], shape: TensorShape) -> list[Tensor]:
        """The whole HF tensors, [...] in their dtype, from the parameter's shards in rank order."""
        ...


@dataclass(frozen=True)
class Direct(Mapping):
    """One tensor for one parameter, cut along `split` (None: every rank has all of it)."""

    hf_name: str
    split: int | None = None

    @property
    def hf_names(self) -> tuple[str, ...]:
        """The one name."""
        return (self.hf_name,)

    def to_shard(self, tensors: Sequence[Tensor], shape: TensorShape, rank: int, size: int) -> Tensor:
        """Piece `rank` along `split`."""
        return tensors[0] if self.split is None else tensors[0].tensor_split(size, self.split)[rank]

    def to_hf(self, shards: Sequence[Tensor], shape: TensorShape) -> list[Tensor]:
        """The pieces joined; of a tensor that is not cut, the first rank's."""
        return [shards[0] if self.split is None else torch.cat(list(shards), self.split)]


@dataclass(frozen=True)
class Vocabulary(Mapping):
    """A table with one row a token: rows of zeros are added up to the padded vocabulary, then it is cut by rows."""

    hf_name: str

    @property
    def hf_names(self) -> tuple[str, ...]:
        """The one name."""
        return (self.hf_name,)

    def to_shard(self, tensors: Sequence[Tensor], shape: TensorShape, rank: int, size: int) -> Tensor:
        """Rows of `rank`, padding included."""
        table = tensors[0]
        padding = table.new_zeros(shape.padded_vocab_size - table.shape[0], table.shape[1])
        return torch.cat([table, padding]).tensor_split(size)[rank]

    def to_hf(self, shards: Sequence[Tensor], shape: TensorShape) -> list[Tensor]:
        """The rows of real tokens."""
        return [torch.cat(list(shards))[: shape.vocab_size]]


@dataclass(frozen=True)
class FusedQKV(Mapping):
    """Query, key and value in one parameter: per query group its query heads, then its key head, then its value head."""

    query: str
    key: str
    value: str

    @property
    def hf_names(self) -> tuple[str, ...]:
        """Query, key, value."""
        return (self.query, self.key, self.value)

    def to_shard(self, tensors: Sequence[Tensor], shape: TensorShape, rank: int, size: int) -> Tensor:
        """Rows of `rank`: whole groups, or part of a group where there are more ranks than groups."""
        groups, trailing = shape.num_query_groups, tensors[0].shape[1:]
        fused = torch.cat([tensor.reshape(groups, -1, *trailing) for tensor in tensors], dim=1)
        return fused.reshape(-1, *trailing).tensor_split(size)[rank]

    def to_hf(self, shards: Sequence[Tensor], shape: TensorShape) -> list[Tensor]:
        """Query, key and value, each with its heads in order."""
        whole = torch.cat(list(shards))
        trailing, dim = whole.shape[1:], shape.kv_channels
        grouped = whole.reshape(shape.num_query_groups, -1, *trailing)
        parts = grouped.split([grouped.shape[1] - 2 * dim, dim, dim], dim=1)
        return [part.reshape(-1, *trailing) for part in parts]


@dataclass(frozen=True)
class GatedMLP(Mapping):
    """Gate and up projection in one parameter; each rank holds its rows of the gate, then its rows of the up."""

    gate: str
    up: str

    @property
    def hf_names(self) -> tuple[str, ...]:
        """Gate, up."""
        return (self.gate, self.up)

    def to_shard(self, tensors: Sequence[Tensor], shape: TensorShape, rank: int, size: int) -> Tensor:
        """Rows of `rank` of both, the gate first."""
        return torch.cat([tensor.tensor_split(size)[rank] for tensor in tensors])

    def to_hf(self, shards: Sequence[Tensor], shape: TensorShape) -> list[Tensor]:
        """Gate and up."""
        halves = [shard.chunk(2) for shard in shards]
        return [torch.cat([half[part] for half in halves]) for part in (0, 1)]


@dataclass(frozen=True)
class Experts(Mapping):
    """The same parameter in every expert: `inner`, sharded over the experts' own tensor-parallel group."""

    inner: Mapping

    @property
    def hf_names(self) -> tuple[str, ...]:
        """Those of `inner`, with `{expert}`."""
        return self.inner.hf_names

    def to_shard(self, tensors: Sequence[Tensor], shape: TensorShape, rank: int, size: int) -> Tensor:
        """As `inner`."""
        return self.inner.to_shard(tensors, shape, rank, size)

    def to_hf(self, shards: Sequence[Tensor], shape: TensorShape) -> list[Tensor]:
        """As `inner`."""
        return self.inner.to_hf(shards, shape)


@dataclass(frozen=True)
class Entry:
    """A line of a family's table."""

    megatron: tuple[str, ...]  # spellings of the parameter's name, of which one model has one
    mapping: Mapping
    scope: Scope = "layer"  # which part of the model has it: the whole once, every layer, dense or MoE layers
    is_exported: bool = True  # False: a copy of another parameter, read from HF but not written

    @cached_property
    def patterns(self) -> tuple[re.Pattern[str], ...]:
        """The spellings as expressions with groups `layer` and `expert`."""
        return tuple(re.compile(_pattern(name)) for name in self.megatron)

    def hf_names(self, layer: int | None = None, expert: int | None = None) -> tuple[str, ...]:
        """Names of the HF tensors of this parameter in one layer and expert."""
        return tuple(name.format(layer=layer, expert=expert) for name in self.mapping.hf_names)


def _pattern(name: str) -> str:
    escaped = re.escape(name).replace(r"\{layer\}", r"(?P<layer>\d+)").replace(r"\{expert\}", r"(?P<expert>\d+)")
    return f"^{escaped}$"


def find_entry(entries: Sequence[Entry], name: str) -> tuple[Entry, int | None, int | None] | None:
    """The line that a Megatron parameter name belongs to, with the layer and expert in the name; None if there is none."""
    for entry in entries:
        for pattern in entry.patterns:
            if match := pattern.match(name):
                found = match.groupdict()
                layer, expert = found.get("layer"), found.get("expert")
                return entry, None if layer is None else int(layer), None if expert is None else int(expert)
    return None
