"""This rank's files of a checkpoint: written piece by piece, each with its checksum taken on the way."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor

from megatron_pz.checkpoint.digested import DigestedFile
from megatron_pz.checkpoint.pieces import Fact, write_object, write_piece
from megatron_pz.checkpoint.places import Place

Piece = tuple[Place, Tensor] | tuple[str, Any]
"""A box of numbers, or an object by its key."""

MAX_FILE_BYTES = 4 * 1024**3
"""A further file is begun before one grows larger, so that several can be verified at a time; a single piece always fits."""
ALIGNMENT = 64


@dataclass(frozen=True)
class WrittenFile:
    """A file that is whole and on disk."""

    name: str
    checksum: str
    facts: list[Fact]


class GivenUp(Exception):
    """The writing was given up."""


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
    while rest:
        name = f"__{rank}_{len(found)}.distcp"
        file = DigestedFile(folder / name)
        try:
            facts: list[Fact] = []
            while rest and (not facts or file.tell() + num_bytes([rest[0]]) <= max_file_bytes):
                if given_up.is_set():
                    raise GivenUp
                facts.append(_write(file, rest.popleft()))
            found.append(WrittenFile(name, file.finish(), facts))
        except (OSError, RuntimeError) as error:  # torch's writer has only RuntimeError to say it
            raise file.fault or error from None
        finally:
            file.close()
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


def _write(file: DigestedFile, piece: Piece) -> Fact:
    place, value = piece
    return write_piece(file, place, value.cpu()) if isinstance(place, Place) else write_object(file, place, value)
