"""Where a parameter, or a range of its numbers, stands in the whole tensors of a checkpoint.

Megatron says it of whole parameters (its sharded state dict). The distributed optimizer holds a range of a parameter's
numbers, counted row by row, which may end in the middle of a row: that is a few boxes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

Saved: TypeAlias = "ShardedTensor | ShardedTensorFactory"
"""What Megatron says of a parameter."""


@dataclass(frozen=True)
class Place:
    """A box within a whole tensor of a checkpoint. Leading axes of size 1 count layers or experts."""

    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    whole: tuple[int, ...]  # shape of the whole tensor
    may_differ: bool  # whether a checkpoint's may be of another size: the padding of a vocabulary

    @property
    def numel(self) -> int:
        """Numbers in the box."""
        return math.prod(self.shape)


def sharded_pieces(saved: Saved) -> list[Any]:
    """The sharded tensors that a parameter is saved as: itself, or e.g. gate and up of a fused matrix."""
    if isinstance(saved, ShardedTensor):
        return [saved]
    built = saved.build()
    return [built] if isinstance(built, ShardedTensor) else list(nested_values(built))


def place_of(piece: Any) -> Place:
    """Of a sharded tensor."""
    shape = (1,) * piece.prepend_axis_num + tuple(piece.local_shape)
    return Place(
        piece.key, tuple(piece.global_offset), shape, tuple(piece.global_shape), bool(piece.allow_shape_mismatch)
    )


def boxes(shape: Sequence[int], start: int, stop: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Offset and shape of the boxes that numbers `start` to `stop - 1` of an array fill, counted row by row, in that order.

    >>> boxes((4, 5), 3, 17)
    [((0, 3), (1, 2)), ((1, 0), (2, 5)), ((3, 0), (1, 2))]
    >>> boxes((4, 5), 6, 8)
    [((1, 1), (1, 2))]
    """
    if start >= stop:
        return []
    if len(shape) < 2:
        return [((start,), (stop - start,))] if shape else [((), ())]
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:
        return _in_row(shape, last, start - last * row, stop - last * row)
    found = _in_row(shape, first - 1, start - (first - 1) * row, row) if start < first * row else []
    if first < last:
        found.append(((first, *(0 for _ in shape[1:])), (last - first, *shape[1:])))
    return found + _in_row(shape, last, 0, stop - last * row)


def _in_row(shape: Sequence[int], row: int, start: int, stop: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [((row, *offset), (1, *size)) for offset, size in boxes(shape[1:], start, stop)]


def places_of_range(saved: Saved, shape: Sequence[int], start: int, stop: int) -> list[Place]:
    """Places of numbers `start` to `stop - 1` of a parameter of this rank, in their order.

    Args:
        shape: of the parameter on this rank.
    """
    if isinstance(saved, ShardedTensor):
        parts = [(0, saved)]
    else:
        # Built on shapes alone; where a view begins tells which of the parameter's numbers it holds.
        built = sharded_pieces(dataclasses.replace(saved, data=torch.empty(tuple(shape), device="meta")))
        assert all(part.data.is_contiguous() for part in built), f"{saved.key} is not cut into runs of numbers"
        parts = sorted(((part.data.storage_offset(), part) for part in built), key=lambda pair: pair[0])
    found = []
    for first, part in parts:
        place, size = place_of(part), tuple(part.local_shape)
        begin, end = max(start - first, 0), min(stop - first, math.prod(size))
        lead = len(place.shape) - len(size)
        for offset, box in boxes(size, begin, end):
            here = tuple(a + b for a, b in zip(place.offset, (0,) * lead + offset, strict=True))
            found.append(dataclasses.replace(place, offset=here, shape=(1,) * lead + box))
    return found
