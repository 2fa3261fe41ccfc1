"""Named tensors in groups of bounded size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

Bucket = list[tuple[str, Tensor]]


def buckets(tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[Bucket]:
    """`tensors` in order, in groups of one dtype and at most `max_bytes`; a tensor that is larger goes alone.

    One dtype, so that each tensor begins at a multiple of its element's size where a group is one run of bytes.
    """
    bucket: Bucket = []
    held = 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if bucket and (held + size > max_bytes or tensor.dtype != bucket[0][1].dtype):
            yield bucket
            bucket, held = [], 0
        bucket.append((name, tensor))
        held += size
    if bucket:
        yield bucket


def joined(bucket: Bucket) -> Tensor:
    """The bytes of all tensors of `bucket`, one after the other, on their device; uint8."""
    return torch.cat([tensor.detach().contiguous().view(-1).view(torch.uint8) for _, tensor in bucket])
