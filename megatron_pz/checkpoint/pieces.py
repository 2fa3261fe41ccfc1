"""A distributed checkpoint's files, written and read one piece of a tensor at a time.

The format is that of `torch.distributed.checkpoint`, as Megatron's `torch_dist` saves it: `*.distcp` are pieces saved by
`torch.save`, one after the other; `.metadata` is a pickle of where each stands.
"""

from __future__ import annotations

import io
import math
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_pz.checkpoint.digested import DigestedFile
from megatron_pz.checkpoint.mapped import MappedFile, exact
from megatron_pz.checkpoint.places import Place
from megatron_pz.errors import CheckpointError

METADATA, COMMON = ".metadata", "common.pt"

Fact = list[Any]
"""Of a piece, as JSON: key, offset, shape, whole shape, dtype, first byte, bytes; of an object, with None from offset on."""


def write_piece(file: DigestedFile, place: Place, value: Tensor) -> Fact:
    """Append `value`, [*place.shape] of any dtype in host memory, to `file`; what has to be known of it."""
    start = file.tell()
    value = exact(value.detach())
    file.lent = value.reshape(-1).view(torch.uint8).numpy()
    _save(value, file)
    file.lent = None
    dtype = str(value.dtype).removeprefix("torch.")
    return [place.key, [*place.offset], [*place.shape], [*place.whole], dtype, start, file.tell() - start]


def write_object(file: DigestedFile, key: str, value: Any = None) -> Fact:
    """Append the object `key` as Megatron saves one. (A converted checkpoint knows nothing of it.)"""
    start = file.tell()
    _save([value], file)
    return [key, None, None, None, None, start, file.tell() - start]


def _save(thing: Any, file: DigestedFile) -> None:
    """`torch.save` without CRC sums, which take seven times as long as the rest: the manifest has a checksum of the file."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(thing, cast("IO[bytes]", file))
    finally:
        torch.serialization.set_crc32_options(before)


def write_index(folder: Path, facts: Mapping[str, Sequence[Fact]]) -> None:
    """What makes a checkpoint of `folder` out of its files: `facts` of each by its name."""
    tensors: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for name, held in facts.items():
        for key, offset, shape, whole, dtype, start, length in held:
            if offset is None:
                tensors[key] = BytesStorageMetadata()
                index = MetadataIndex(key)
            else:
                properties = TensorProperties(dtype=getattr(torch, dtype))
                known = tensors.setdefault(key, TensorStorageMetadata(properties, torch.Size(whole), []))
                known.chunks.append(ChunkStorageMetadata(torch.Size(offset), torch.Size(shape)))
                index = MetadataIndex(key, torch.Size(offset))
            storage[index] = _StorageInfo(name, start, length)
    metadata = Metadata(tensors, storage_data=storage, storage_meta=StorageMeta())
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    torch.save({}, folder / COMMON)
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


_DAMAGED = AttributeError, EOFError, ImportError, LookupError, TypeError, ValueError
"""What reading a pickle that was altered may end in, beside its own error."""


class PieceReader:
    """Tensors of a distributed checkpoint, saved under any layout.

    Raises:
        CheckpointError: `folder` has no readable index.
    """

    def __init__(self, folder: Path) -> None:
        try:
            found = pickle.loads((folder / METADATA).read_bytes())
            self._tensors, self._storage = found.state_dict_metadata, found.storage_data
        except (OSError, pickle.UnpicklingError, *_DAMAGED) as error:
            raise CheckpointError(
                f"{folder / METADATA} cannot be read ({error}); it is no distributed checkpoint."
            ) from error
        self.folder = folder
        self._files: dict[str, MappedFile] = {}
        self._grids: dict[str, _Grid] = {}
        self._described_by_length: dict[int, list[_Description]] = {}
        self._last: tuple[MetadataIndex, Tensor] | None = None

    def tensor_keys(self) -> set[str]:
        """Of every tensor, the optimizer's among them."""
        return {key for key, known in self._tensors.items() if isinstance(known, TensorStorageMetadata)}

    def dtype(self, key: str) -> torch.dtype:
        """Of the tensor `key`."""
        found: torch.dtype = self._tensors[key].properties.dtype
        return found

    def shape(self, key: str) -> tuple[int, ...]:
        """Of the whole tensor `key`."""
        return tuple(self._tensors[key].size)

    def num_pieces(self, key: str) -> int:
        """Pieces that the tensor `key` is saved in."""
        return len(self._tensors[key].chunks)

    def read(self, place: Place) -> Tensor:
        """What stands at `place`, [*place.shape] in the checkpoint's dtype; rows of zeros where its vocabulary is padded further.

        Raises:
            CheckpointError: a part of it is missing, or the whole tensor is of another shape.
        """
        size = self.shape(place.key)
        if size != place.whole and not (place.may_differ and size[1:] == place.whole[1:]):
            raise CheckpointError(f"{self.folder}: {place.key} has shape {size}, config.json makes it {place.whole}.")
        if place.key not in self._grids:
            self._grids[place.key] = _Grid(self._tensors[place.key].chunks)
        value, missing = None, place.numel
        for offset, shape in self._grids[place.key].touching(place):
            piece = self._piece(place.key, offset)
            if offset == place.offset and shape == place.shape:
                return piece
            if value is None:
                value = torch.zeros(place.shape, dtype=piece.dtype)
            box = _overlap(place, offset, shape)
            there = tuple(slice(lo - o, hi - o) for (lo, hi), o in zip(box, place.offset, strict=True))
            here = tuple(slice(lo - o, hi - o) for (lo, hi), o in zip(box, offset, strict=True))
            value[there] = piece[here]
            missing -= math.prod(hi - lo for lo, hi in box)
        if place.may_differ:  # rows from size[0] on are padding
            there_are = min(max(size[0] - place.offset[0], 0), place.shape[0])
            missing -= (place.shape[0] - there_are) * math.prod(place.shape[1:])
        if missing:
            raise CheckpointError(f"{self.folder}: {missing} of {place.numel} numbers of {place.key} are missing.")
        return torch.zeros(place.shape, dtype=self.dtype(place.key)) if value is None else value

    def close(self) -> None:
        """Let go of the files; tensors that were read keep what they need."""
        self._files.clear()
        self._last = None

    def _piece(self, key: str, offset: tuple[int, ...]) -> Tensor:
        index = MetadataIndex(key, torch.Size(offset))
        if self._last is not None and self._last[0] == index:  # boxes that follow one another are often of one piece
            return self._last[1]
        stored = self._storage[index]
        path = self.folder / stored.relative_path
        try:
            if stored.relative_path not in self._files:
                self._files[stored.relative_path] = MappedFile(path)
            file = self._files[stored.relative_path]
            known = self._described(file.part(stored.offset, stored.length))
            numbers = file.tensor(stored.offset + known.start, known.dtype, (known.numel,))
        except (OSError, ValueError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise CheckpointError(f"{path} is damaged where {key} stands: {error}.") from error
        piece = numbers.as_strided(known.shape, known.stride, known.offset)
        self._last = (index, piece)
        return piece

    def _described(self, part: memoryview) -> _Description:
        """What `torch.save` wrote before the numbers of a piece. Pieces of one shape, as experts are, begin with the same bytes."""
        alike = self._described_by_length.setdefault(len(part), [])
        for known in alike:
            if part[: known.start] == known.head:
                return known
        # A tensor that only knows where its numbers are: `torch.load` would copy them twice.
        with FakeTensorMode():
            tensor = torch.load(cast("IO[bytes]", _Part(part)), weights_only=True)
        storage = tensor.untyped_storage()
        start = storage._checkpoint_offset
        found = _Description(
            bytes(part[:start]),
            start,
            tensor.dtype,
            storage.nbytes() // tensor.itemsize,
            tuple(tensor.shape),
            tensor.stride(),
            tensor.storage_offset(),
        )
        alike[:] = [*alike[-7:], found]  # files that carry sums of their numbers are all different
        return found


@dataclass(frozen=True, slots=True)
class _Description:
    """A tensor in a file of `torch.save`."""

    head: bytes  # before its numbers
    start: int  # where those begin
    dtype: torch.dtype
    numel: int  # of the storage
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int  # in the storage


class _Grid:
    """The pieces of a tensor: which of them a box touches."""

    def __init__(self, chunks: Sequence[ChunkStorageMetadata]) -> None:
        self._first = np.array([tuple(chunk.offsets) for chunk in chunks])
        self._shape = np.array([tuple(chunk.sizes) for chunk in chunks])
        self._known = set(zip(map(tuple, self._first.tolist()), map(tuple, self._shape.tolist()), strict=True))

    def touching(self, place: Place) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Offsets and shapes."""
        if (place.offset, place.shape) in self._known:
            return [(place.offset, place.shape)]
        offset, shape = np.array(place.offset), np.array(place.shape)
        touched = ((self._first < offset + shape) & (offset < self._first + self._shape)).all(axis=1)
        return [
            (tuple(first), tuple(size))
            for first, size in zip(self._first[touched].tolist(), self._shape[touched].tolist(), strict=True)
        ]


class _Part(io.RawIOBase):
    """Bytes as a file."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._at = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: len(self._data)}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        found = self._data[self._at : self._at + len(buffer)]
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)


def _overlap(place: Place, offset: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, int]]:
    """For each axis first and last + 1 of what `place` shares with a piece."""
    return [(max(a, b), min(a + n, b + m)) for a, n, b, m in zip(place.offset, place.shape, offset, sizes, strict=True)]
