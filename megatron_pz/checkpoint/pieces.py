"""A distributed checkpoint's files, written and read one piece of a tensor at a time.

The format is that of `torch.distributed.checkpoint`, as Megatron's `torch_dist` saves it: `*.distcp` are pieces saved by
`torch.save`, one after the other; `.metadata` is a pickle of where each stands.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

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

from megatron_pz.checkpoint.digested import DigestedFile, MappedFile, exact
from megatron_pz.checkpoint.skeleton import Place
from megatron_pz.errors import CheckpointError

METADATA, COMMON = ".metadata", "common.pt"

Fact = list[Any]
"""Of a piece, as JSON: key, offset, shape, whole shape, dtype, first byte, bytes; of an object, with None from offset on."""


def write_piece(file: DigestedFile, place: Place, value: Tensor) -> Fact:
    """Append `value` to `file`; what has to be known of it."""
    start = file.tell()
    value = exact(value)
    file.lent = value.reshape(-1).view(torch.uint8).numpy()
    _save(value, file)
    file.lent = None
    dtype = str(value.dtype).removeprefix("torch.")
    return [place.key, [*place.offset], [*place.shape], [*place.whole], dtype, start, file.tell() - start]


def write_object(file: DigestedFile, key: str) -> Fact:
    """Append the object `key`, of which a converted checkpoint knows nothing, as Megatron saves one that is None."""
    start = file.tell()
    _save([None], file)
    return [key, None, None, None, None, start, file.tell() - start]


def _save(thing: Any, file: DigestedFile) -> None:
    """`torch.save` without CRC sums, which take seven times as long as the rest: the manifest has a digest of the file."""
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


class PieceReader:
    """Tensors of a distributed checkpoint, saved under any layout.

    Raises:
        CheckpointError: `folder` has no readable index.
    """

    def __init__(self, folder: Path) -> None:
        try:
            found = pickle.loads((folder / METADATA).read_bytes())
            self._tensors, self._storage = found.state_dict_metadata, found.storage_data
        except (OSError, pickle.UnpicklingError, AttributeError, EOFError) as error:
            raise CheckpointError(
                f"{folder / METADATA} cannot be read ({error}); it is no distributed checkpoint."
            ) from error
        self._folder = folder
        self._files: dict[Path, MappedFile] = {}

    def tensor_keys(self) -> set[str]:
        """Of every tensor, the optimizer's among them."""
        return {key for key, known in self._tensors.items() if isinstance(known, TensorStorageMetadata)}

    def dtype(self, key: str) -> torch.dtype:
        """Of the tensor `key`."""
        found: torch.dtype = self._tensors[key].properties.dtype
        return found

    def read(self, place: Place) -> Tensor:
        """What stands at `place`; rows of zeros where its vocabulary is padded further than the checkpoint's.

        Raises:
            CheckpointError: a part of it is missing, or the whole tensor is of another shape.
        """
        known = self._tensors[place.key]
        if tuple(known.size) != place.whole and not (place.may_differ and tuple(known.size)[1:] == place.whole[1:]):
            raise CheckpointError(
                f"{self._folder}: {place.key} has shape {tuple(known.size)}, config.json makes it {place.whole}."
            )
        value, missing = None, _numel(place.shape)
        for chunk in known.chunks:
            box = _overlap(place, tuple(chunk.offsets), tuple(chunk.sizes))
            if box is None:
                continue
            piece = self._piece(place.key, chunk.offsets)
            if tuple(chunk.offsets) == place.offset and tuple(chunk.sizes) == place.shape:
                return piece
            if value is None:
                value = torch.zeros(place.shape, dtype=piece.dtype)
            there = tuple(slice(lo - o, hi - o) for (lo, hi), o in zip(box, place.offset, strict=True))
            here = tuple(slice(lo - o, hi - o) for (lo, hi), o in zip(box, chunk.offsets, strict=True))
            value[there] = piece[here]
            missing -= _numel([hi - lo for lo, hi in box])
        if place.may_differ and known.size[0] < place.whole[0]:
            missing -= _numel(place.shape) - min(known.size[0], place.shape[0]) * _numel(place.shape[1:])
        if value is None or missing:
            raise CheckpointError(
                f"{self._folder}: {missing} of {_numel(place.shape)} numbers of {place.key} are missing."
            )
        return value

    def _piece(self, key: str, offset: Sequence[int]) -> Tensor:
        stored = self._storage[MetadataIndex(key, torch.Size(offset))]
        path = self._folder / stored.relative_path
        try:
            if path not in self._files:
                self._files[path] = MappedFile(path)
            # A tensor that only knows where its numbers are: `torch.load` would copy them twice.
            with FakeTensorMode():
                part = _Part(self._files[path].part(stored.offset, stored.length))
                known = torch.load(cast("IO[bytes]", part), weights_only=True)
            start = stored.offset + known.untyped_storage()._checkpoint_offset
            numbers = self._files[path].tensor(
                start, known.dtype, (known.untyped_storage().nbytes() // known.itemsize,)
            )
        except (OSError, ValueError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise CheckpointError(f"{path} is damaged where {key} stands: {error}.") from error
        return numbers.as_strided(known.shape, known.stride(), known.storage_offset())


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


def _overlap(place: Place, offset: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, int]] | None:
    """For each axis first and last + 1 of what `place` shares with a chunk."""
    box = [(max(a, b), min(a + n, b + m)) for a, n, b, m in zip(place.offset, place.shape, offset, sizes, strict=True)]
    return None if any(lo >= hi for lo, hi in box) else box


def _numel(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
