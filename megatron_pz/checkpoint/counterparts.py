"""What stands for a parameter in a checkpoint and in a Hugging Face folder, each made of the other. Nothing is copied needlessly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from megatron_pz.checkpoint import fp8
from megatron_pz.checkpoint.pieces import PieceReader
from megatron_pz.checkpoint.places import Place
from megatron_pz.checkpoint.skeleton import Parameter
from megatron_pz.checkpoint.tensor_file import MappedTensors, Spec

FP8 = "fp8_blockwise"
VOCABULARY_DIVISOR = 8  # as `model.make_vocab_size_divisible_by`; a layout that pads further still loads it

Encode = Callable[[str, Tensor], list[tuple[str, Tensor]]]
"""What stands in the output for a Hugging Face tensor."""


def encoder(dtype: torch.dtype | str | None) -> Encode:
    """What `dtype` makes of a tensor."""
    if dtype == FP8:
        return fp8.encoded
    assert not isinstance(dtype, str)
    return lambda name, tensor: [(name, tensor if dtype is None else tensor.to(dtype))]


def pieces(parameter: Parameter, tensors: MappedTensors, dtype: torch.dtype | None) -> Iterable[tuple[Place, Tensor]]:
    """What stands in a checkpoint for a parameter: pieces [*place.shape], in `dtype` or, where it is None, in the folder's."""
    if not parameter.is_saved_as_hf:
        return parameter.cut(from_hf(parameter, tensors, dtype))
    found = [
        (place, tensors.read(name)) for place, name in zip(parameter.places(), parameter.shard.hf_names, strict=True)
    ]
    return [(place, (one if dtype is None else one.to(dtype)).reshape(place.shape)) for place, one in found]


def written(parameter: Parameter, reader: PieceReader, encode: Encode) -> Iterator[tuple[str, Tensor]]:
    """What stands in a Hugging Face folder for a parameter: (name, tensor [...] of the dtype that `encode` gives)."""
    if not parameter.is_saved_as_hf:
        yield from _encoded(parameter, joined(parameter, reader), encode)
        return
    shapes = parameter.shard.hf_shapes()
    for place, name, shape in zip(parameter.places(), parameter.shard.hf_names, shapes, strict=True):
        yield from encode(name, reader.read(place).reshape(shape))


def from_hf(parameter: Parameter, reader: MappedTensors, dtype: torch.dtype | None) -> Tensor:
    """The whole parameter, [...] in `dtype` or, where it is None, in the folder's."""
    value = parameter.from_hf([reader.read(name) for name in parameter.shard.hf_names])
    return value if dtype is None else value.to(dtype)


def joined(parameter: Parameter, reader: PieceReader) -> Tensor:
    """The whole parameter, [...] in the checkpoint's dtype."""
    return parameter.join([reader.read(place) for place in parameter.places()])


def specs_of(parameter: Parameter, reader: PieceReader, encode: Encode) -> list[Spec]:
    """Of what `written` will give."""
    dtype = reader.dtype(parameter.places()[0].key)
    value = torch.empty(parameter.shard.parameter.shape, dtype=dtype, device="meta")
    return [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in _encoded(parameter, value, encode)]


def spec_bytes(given: Sequence[Spec]) -> int:
    """Of tensors of these specs."""
    return sum(dtype.itemsize * torch.Size(shape).numel() for _, dtype, shape in given)


def _encoded(parameter: Parameter, value: Tensor, encode: Encode) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in zip(parameter.shard.hf_names, parameter.to_hf(value), strict=True):
        yield from encode(name, tensor)
