"""Checksums that tell damage, not malice: as fast as the disk, and named where they are stored so that another may follow.

A CRC-32 overlooks one altered file in four thousand million. It takes a third of a SHA-256's time or less, which bound saving and
conversion before.
"""

from __future__ import annotations

import functools
import hashlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import Any, Protocol

from megatron_pz.errors import CheckpointError

BLOCK = 4 * 1024**2


class Checksum(Protocol):
    """Of bytes that come one after the other."""

    def update(self, data: memoryview, /) -> None:
        """Take the next bytes."""

    def hexdigest(self) -> str:
        """Of all bytes so far."""


class Crc32:
    """That of gzip and PNG."""

    def __init__(self) -> None:
        self.value = 0

    def update(self, data: memoryview, /) -> None:
        """Take the next bytes."""
        self.value = zlib.crc32(data, self.value)

    def join(self, value: int, length: int) -> None:
        """Take the next `length` bytes, of which only the checksum `value` is known."""
        # A CRC is linear: what it was before is what zeros in the place of the next bytes make it, and theirs is added.
        power = 0
        while length:
            if length & 1:
                self.value = _product(_zeros(power), self.value)
            length, power = length >> 1, power + 1
        self.value ^= value

    def hexdigest(self) -> str:
        """Eight digits."""
        return f"{self.value:08x}"


def _product(columns: Sequence[int], vector: int) -> int:
    """Of a matrix of bits, given as 32 columns, and a vector of 32 bits."""
    found = 0
    for column in columns:
        if vector & 1:
            found ^= column
        vector >>= 1
    return found


@functools.cache
def _zeros(power: int) -> tuple[int, ...]:
    """The matrix that 2**power bytes of zeros are to a CRC-32."""
    if power == 0:
        bit = (0xEDB88320, *(1 << place for place in range(31)))  # one bit of zero
        return functools.reduce(lambda matrix, _: tuple(_product(matrix, column) for column in matrix), range(3), bit)
    half = _zeros(power - 1)
    return tuple(_product(half, column) for column in half)


ALGORITHM = "crc32"
"""Of what is written."""
_MAKE: dict[str, Callable[[], Checksum]] = {ALGORITHM: Crc32, "sha256": hashlib.sha256}


def begun(algorithm: str = ALGORITHM) -> Checksum:
    """The checksum of nothing.

    Raises:
        CheckpointError: no such algorithm.
    """
    if algorithm not in _MAKE:
        raise CheckpointError(
            f"checksum {algorithm!r} is not known here, {' and '.join(_MAKE)} are: "
            "a newer version of this program wrote it; read it with that."
        )
    return _MAKE[algorithm]()


def told(checksum: Checksum, algorithm: str = ALGORITHM) -> str:
    """As it is stored: `crc32:cbf43926`."""
    return f"{algorithm}:{checksum.hexdigest()}"


def stored(facts: Mapping[str, Any]) -> str:
    """The checksum of a file in a manifest; formats 1 and 2 have a bare SHA-256 each."""
    found: str = facts["checksum"] if "checksum" in facts else f"sha256:{facts['sha256']}"
    return found


def of_file(path: Path, algorithm: str = ALGORITHM, advance: Any = lambda _: None) -> str:
    """As it is stored. The next block is read while one is being summed.

    Args:
        advance: told the bytes that were read.

    Raises:
        CheckpointError: no such algorithm.
        OSError: the file cannot be read.
    """
    checksum = begun(algorithm)
    blocks = [memoryview(bytearray(BLOCK)) for _ in range(2)]
    with path.open("rb", buffering=0) as stream, ThreadPoolExecutor(1) as helper:
        pending: Future[None] | None = None
        for block in cycle(blocks):
            count = stream.readinto(block)
            if pending is not None:
                pending.result()
            if not count:
                break
            pending = helper.submit(checksum.update, block[:count])
            advance(count)
    return told(checksum, algorithm)
