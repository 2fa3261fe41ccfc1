"""Files that are summed while they are written, by a few threads that share the blocks of each.

A thread sums a block and writes it while it is still in the core's cache; the checksums of blocks are joined to that of the
file. So the memory is passed once, and a file is as quick as the kernel's copying. Another thread has the disk begin.
"""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_pz.checkpoint.checksum import Crc32, told
from megatron_pz.checkpoint.mapped import exact

WRITERS = min(4, os.cpu_count() or 1)
"""Threads of a file. More gain nothing: the kernel lets one at a time write into a file, others sum meanwhile."""
BLOCK = 4 * 1024**2
"""Bytes that a thread is handed at a time."""
CACHED = 512 * 1024
"""Bytes that are summed and then written, within a core's cache."""
BEHIND = 256 * 1024**2
"""Bytes that may wait for a thread."""
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
        self._handle = self._file.fileno()
        self._checksum = Crc32()
        self._writers, self._flusher = ThreadPoolExecutor(WRITERS), ThreadPoolExecutor(1)
        self._flush: Future[None] | None = None
        self._unflushed = 0
        self._waiting: deque[tuple[Future[int], int]] = deque()  # blocks in the file's order, with their sizes
        self._behind = 0
        self._small, self._size, self._sent = bytearray(), 0, 0
        self.fault: OSError | None = None
        self.lent: np.ndarray | None = None  # memory that stays as it is: bytes of it are not copied

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
            while self._waiting:
                self._settle_first()
            if self._flush is not None:
                self._flush.result()
            os.fsync(self._handle)
        finally:
            self.close()
        return told(self._checksum)

    def close(self) -> None:
        """Stop, whether complete or not."""
        self._writers.shutdown(cancel_futures=True)
        self._flusher.shutdown()
        self._file.close()

    def _send_small(self) -> None:
        gathered, self._small = self._small, bytearray()
        if gathered:
            self._send(memoryview(gathered))

    def _send(self, kept: memoryview) -> None:
        """To the threads; `kept` does not change any more."""
        for start in range(0, len(kept), BLOCK):
            block = kept[start : start + BLOCK]
            self._waiting.append((self._writers.submit(_store, self._handle, block, self._sent), len(block)))
            self._sent += len(block)
            self._behind += len(block)
            while self._behind > BEHIND or self._waiting and self._waiting[0][0].done():
                self._settle_first()

    def _settle_first(self) -> None:
        """Take the checksum of the first block that waits, and have the disk begin where there is enough for it."""
        future, size = self._waiting.popleft()
        try:
            self._checksum.join(future.result(), size)
        except OSError as error:
            self.fault = self.fault or error
            raise
        self._behind -= size
        self._unflushed += size
        if self._unflushed >= FLUSH_EVERY and (self._flush is None or self._flush.done()):
            if self._flush is not None:
                self._flush.result()
            self._unflushed = 0
            self._flush = self._flusher.submit(os.fdatasync, self._handle)


def _store(handle: int, block: memoryview, offset: int) -> int:
    """Write `block` at `offset` of a file; its checksum."""
    checksum = Crc32()
    for start in range(0, len(block), CACHED):
        rest = block[start : start + CACHED]
        checksum.update(rest)
        while rest:
            count = os.pwrite(handle, rest, offset)
            rest, offset = rest[count:], offset + count
    return checksum.value
