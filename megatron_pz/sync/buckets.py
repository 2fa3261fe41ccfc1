"""Named tensors in groups of bounded size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

Bucket = list[tuple[str, Tensor]]


def buckets(tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[Bucket]:
    """`tensors`, [...] each, in groups of one dtype, in order within a dtype; all that wait together have at most `max_bytes`, and
    a tensor that is larger goes alone.

    One dtype, so that each tensor begins at a multiple of its element's size where a group is one run of bytes. Groups of
    several dtypes fill side by side: FP8 weights and their float32 scales come by turns.
    """
    waiting: dict[torch.dtype, Bucket] = {}
    held: dict[torch.dtype, int] = {}
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        while waiting and sum(held.values()) + size > max_bytes:
            fullest = max(waiting, key=held.__getitem__)
            del held[fullest]
            yield waiting.pop(fullest)
        waiting.setdefault(tensor.dtype, []).append((name, tensor))
        held[tensor.dtype] = held.get(tensor.dtype, 0) + size
    yield from waiting.values()


def joined(bucket: Bucket) -> Tensor:
    """The bytes of all tensors of `bucket`, one after the other, on their device: uint8 [bytes]."""
    return torch.cat([tensor.detach().contiguous().view(-1).view(torch.uint8) for _, tensor in bucket])
