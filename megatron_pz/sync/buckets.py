"""Named tensors in groups of bounded size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

Bucket = list[tuple[str, Tensor]]


def buckets(tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[Bucket]:
    """`tensors` in order, in groups of at most `max_bytes`; a tensor that is larger goes alone."""
    bucket: Bucket = []
    held = 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if bucket and held + size > max_bytes:
            yield bucket
            bucket, held = [], 0
        bucket.append((name, tensor))
        held += size
    if bucket:
        yield bucket
