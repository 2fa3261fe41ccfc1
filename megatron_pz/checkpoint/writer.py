"""This rank's files of a checkpoint: written piece by piece, each with its digest taken on the way."""

from __future__ import annotations

import hashlib
import math
import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, cast

import torch
from torch import Tensor

from megatron_pz.checkpoint.pieces import Fact, write_object, write_piece
from megatron_pz.checkpoint.places import Place

Piece = tuple[Place, Tensor] | tuple[str, Any]
"""A box of numbers, or an object by its key."""

MAX_FILE_BYTES = 4 * 1024**3
"""A further file is begun before one grows larger, so that several can be verified at a time; a single piece always fits."""
AT_ONCE = 1 << 20
"""Bytes from which the digest is taken beside the writing."""
FLUSH_EVERY = 64 * 1024**2
"""Bytes after which the disk is told to begin."""
ALIGNMENT = 64


@dataclass(frozen=True)
class WrittenFile:
    """A file that is whole and on disk."""

    name: str
    sha256: str
    facts: list[Fact]


class GivenUp(Exception):
    """The writing was given up."""


class _Digested:
    """A file under way. What the disk refused first is kept: torch's writer tells only that something failed."""

    def __init__(self, path: Path, helper: ThreadPoolExecutor, flusher: ThreadPoolExecutor) -> None:
        self._file, self._helper, self._digest = path.open("wb"), helper, hashlib.sha256()
        self._flusher, self._flushes, self._unflushed = flusher, deque[Future[None]](), 0
        self.fault: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            self._send_on(len(data))
            if len(data) < AT_ONCE:
                self._digest.update(data)
                return self._file.write(data)
            beside = self._helper.submit(self._digest.update, data)
            try:
                return self._file.write(data)
            finally:
                beside.result()
        except OSError as error:
            self.fault = self.fault or error
            raise

    def _send_on(self, count: int) -> None:
        """Have the disk work while digests are taken, not only at the end."""
        self._unflushed += count
        while self._flushes and self._flushes[0].done():
            self._flushes.popleft().result()
        if self._unflushed >= FLUSH_EVERY and not self._flushes:
            self._unflushed = 0
            self._flushes.append(self._flusher.submit(os.fdatasync, self._file.fileno()))

    def flush(self) -> None:
        """Nothing has to be on disk before the end."""

    def tell(self) -> int:
        return self._file.tell()

    def finish(self) -> str:
        """Have it on disk; its SHA-256."""
        with self._file:
            self._file.flush()
            for flush in self._flushes:
                flush.result()
            os.fsync(self._file.fileno())
        return self._digest.hexdigest()

    def drop(self) -> None:
        """Close it, whatever the disk says by now."""
        wait(self._flushes)
        try:
            self._file.close()
        except OSError as error:
            self.fault = self.fault or error


def write_files(
    pieces: Sequence[Piece], folder: Path, rank: int, given_up: Event, max_file_bytes: int = MAX_FILE_BYTES
) -> list[WrittenFile]:
    """Write `__RANK_0.distcp` and on. Tensors on an accelerator are fetched one by one.

    Args:
        given_up: once it is set, no further piece is written.

    Raises:
        OSError: the disk refused.
        GivenUp: `given_up` was set.
    """
    found: list[WrittenFile] = []
    rest = deque(pieces)
    with ThreadPoolExecutor(1) as helper, ThreadPoolExecutor(1) as flusher:
        while rest:
            name = f"__{rank}_{len(found)}.distcp"
            file = _Digested(folder / name, helper, flusher)
            try:
                facts: list[Fact] = []
                while rest and (not facts or file.tell() + num_bytes([rest[0]]) <= max_file_bytes):
                    if given_up.is_set():
                        raise GivenUp
                    facts.append(_write(cast("Any", file), rest.popleft()))
                found.append(WrittenFile(name, file.finish(), facts))
            except (OSError, RuntimeError) as error:  # torch's writer has only RuntimeError to say it
                raise file.fault or error from None
            finally:
                file.drop()
    return found


def num_bytes(pieces: Sequence[Piece]) -> int:
    """Of the numbers in `pieces`."""
    return sum(value.nbytes for place, value in pieces if isinstance(place, Place))


class HostCopy:
    """A rank's pieces as they were at one moment, for a file that is written while training goes on.

    The room is taken at the first copy and kept: fresh memory costs several times what copying does. On an accelerator it is
    page-locked.
    """

    def __init__(self) -> None:
        self._room = torch.empty(0, dtype=torch.uint8)

    @property
    def num_bytes(self) -> int:
        """Room that was taken."""
        return self._room.nbytes

    def take(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The same pieces, in host memory; an earlier copy is overwritten."""
        tensors = [value for place, value in pieces if isinstance(place, Place)]
        starts, size = [], 0
        for tensor in tensors:
            starts.append(size)
            size += math.ceil(tensor.nbytes / ALIGNMENT) * ALIGNMENT
        if self._room.nbytes != size:
            self._room = torch.empty(0, dtype=torch.uint8)  # the old room goes before the new one comes
            pinned = any(tensor.device.type != "cpu" for tensor in tensors)
            self._room = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        copies = []
        for tensor, start in zip(tensors, starts, strict=True):
            copy = self._room[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            copies.append(copy.copy_(tensor))
        given = iter(copies)
        return [(place, next(given)) if isinstance(place, Place) else (place, value) for place, value in pieces]


def _write(file: Any, piece: Piece) -> Fact:
    place, value = piece
    return write_piece(file, place, value.cpu()) if isinstance(place, Place) else write_object(file, place, value)
