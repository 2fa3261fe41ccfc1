"""Files that are summed while they are written, and files whose numbers are used where they stand.

One thread writes, another sums the same bytes, and a third has the disk begin, so that each takes its time beside the others'. A
tensor that only moves from one file to another is never copied.
"""

from __future__ import annotations

import math
import mmap
import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_pz.checkpoint import checksum

BEHIND = 256 * 1024**2
"""Bytes that the checksum may be behind the writing, and mapped bytes that stay in memory."""
FLUSH_EVERY = 64 * 1024**2
"""Bytes after which the disk is told to begin."""
SMALL = 1024**2
"""Bytes below which writes are gathered: `torch.save` makes ten for each tensor."""


class DigestedFile:
    """A new file, open for writing. `write` and `flush` are what `torch.save` asks for.

    What the disk refused first is kept in `fault`: torch's writer tells only that something failed.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._checksum = checksum.begun()
        self._summer, self._flusher = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._flush: Future[None] | None = None
        self._unflushed = 0
        self._waiting: deque[tuple[Future[None], int]] = deque()
        self._behind = 0
        self._small, self._size = bytearray(), 0
        self.fault: OSError | None = None
        self.lent: np.ndarray | None = None  # memory that stays as it is: bytes of it are not copied for the checksum

    def write(self, data: bytes | memoryview) -> int:
        """Append `data`; its length in bytes."""
        found, lent = np.frombuffer(data, np.uint8), self.lent
        self._size += found.nbytes
        if found.nbytes < SMALL:
            self._small += memoryview(data).cast("B")
            if len(self._small) >= SMALL:
                self._send_small()
            return found.nbytes
        is_lent = lent is not None and (found.ctypes.data, found.nbytes) == (lent.ctypes.data, lent.nbytes)
        self._send_small()
        self._send(lent.data if lent is not None and is_lent else memoryview(found.tobytes()))
        return found.nbytes

    def write_tensor(self, value: Tensor) -> None:
        """Append the numbers of `value`, [...] of any dtype, which must not change afterwards."""
        self.lent = exact(value).reshape(-1).view(torch.uint8).numpy()
        self.write(self.lent.data)
        self.lent = None

    def tell(self) -> int:
        """Bytes written."""
        return self._size

    def flush(self) -> None:
        """Nothing has to be on disk before the end."""

    def finish(self) -> str:
        """Have everything on disk, and close; the checksum, as it is stored."""
        try:
            self._send_small()
            if self._flush is not None:
                self._flush.result()
            os.fsync(self._file.fileno())
            while self._waiting:
                self._settle_first()
        finally:
            self.close()
        return checksum.told(self._checksum)

    def close(self) -> None:
        """Stop, whether complete or not."""
        self._summer.shutdown()
        self._flusher.shutdown()
        self._file.close()

    def _send_small(self) -> None:
        gathered, self._small = self._small, bytearray()
        if gathered:
            self._send(memoryview(gathered))

    def _send(self, kept: memoryview) -> None:
        """To the checksum and to the file; `kept` does not change any more."""
        self._waiting.append((self._summer.submit(self._checksum.update, kept), len(kept)))
        self._behind += len(kept)
        rest = kept
        try:
            while rest:
                count = self._file.write(rest[:FLUSH_EVERY])
                rest = rest[count:]
                self._have_disk_begin(count)
        except OSError as error:
            self.fault = self.fault or error
            raise
        while self._behind > BEHIND and len(self._waiting) > 1 or len(self._waiting) > 1 and self._waiting[0][0].done():
            self._settle_first()

    def _have_disk_begin(self, count: int) -> None:
        """Have it write what there is, while more comes: `count` bytes came."""
        self._unflushed += count
        if self._unflushed >= FLUSH_EVERY and (self._flush is None or self._flush.done()):
            if self._flush is not None:
                self._flush.result()
            self._unflushed = 0
            self._flush = self._flusher.submit(os.fdatasync, self._file.fileno())

    def _settle_first(self) -> None:
        future, size = self._waiting.popleft()
        future.result()
        self._behind -= size


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
        if self._touched > BEHIND:
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
