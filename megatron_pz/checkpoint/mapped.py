"""Files whose numbers are used where they stand: a tensor that only moves from one file to another is never copied."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

KEPT = 256 * 1024**2
"""Mapped bytes that stay in memory."""


class MappedFile:
    """A file's numbers as tensors that share its pages. Few of the pages stay in memory."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._map.madvise(mmap.MADV_SEQUENTIAL)
        self._touched = 0

    def tensor(self, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        """The tensor [*shape] of `dtype` that stands at byte `offset`; to be read only."""
        count = math.prod(shape)
        if not count:
            return torch.empty(*shape, dtype=dtype)
        self._touched += count * dtype.itemsize
        if self._touched > KEPT:
            # Pages of tensors still in use come back from the file when they are read.
            self._map.madvise(mmap.MADV_DONTNEED)
            self._touched = count * dtype.itemsize
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=offset).reshape(*shape)

    def part(self, offset: int, length: int) -> memoryview:
        """Bytes from `offset` on, without a copy."""
        return memoryview(self._map)[offset : offset + length]


def exact(value: Tensor) -> Tensor:
    """`value`, [...] of any dtype, contiguous and with a storage of its own size: `torch.save` writes a storage as a whole."""
    value = value.contiguous()
    if value.untyped_storage().nbytes() == value.nbytes or not value.numel():
        return value
    return torch.from_numpy(value.reshape(-1).view(torch.uint8).numpy()).view(value.dtype).reshape(value.shape)
