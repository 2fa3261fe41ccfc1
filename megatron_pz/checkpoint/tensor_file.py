"""Safetensors files, tensor by tensor: the library's own writer holds a whole file in memory, its reader copies.

Format: eight bytes of length, a JSON header with each tensor's dtype, shape and place, then the numbers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_pz.checkpoint.digested import DigestedFile
from megatron_pz.checkpoint.hf_import import TensorReader
from megatron_pz.checkpoint.mapped import MappedFile

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
ALIGNMENT = 8

Spec = tuple[str, torch.dtype, tuple[int, ...]]
"""Name, dtype and shape."""


class TensorFile:
    """Written by `add`, in the order of `specs`."""

    def __init__(self, path: Path, specs: Sequence[Spec]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        start = 0
        for name, dtype, shape in specs:
            end = start + dtype.itemsize * torch.Size(shape).numel()
            header[name] = {"dtype": _NAMES[dtype], "shape": [*shape], "data_offsets": [start, end]}
            start = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        self._rest = list(reversed(specs))
        self._file = DigestedFile(path)
        self._file.write(len(text).to_bytes(8, "little") + text)

    def add(self, name: str, tensor: Tensor) -> None:
        """The next tensor, of the shape [...] and dtype that its spec has."""
        wanted = self._rest.pop()
        assert wanted == (name, tensor.dtype, tuple(tensor.shape)), (wanted, name, tensor.dtype, tensor.shape)
        self._file.write_tensor(tensor)

    def finish(self) -> str:
        """On disk, and complete; its checksum."""
        assert not self._rest
        return self._file.finish()

    def close(self) -> None:
        """Stop, whether complete or not."""
        self._file.close()


class MappedTensors:
    """Tensors of a folder, without copies: to be read only.

    Args:
        reader: of the same folder; it has checked the files.
    """

    def __init__(self, reader: TensorReader) -> None:
        self._reader = reader
        self._files: dict[Path, tuple[MappedFile, int, dict[str, Any]]] = {}

    def read(self, name: str) -> Tensor:
        """One whole tensor, [*shape] in the dtype of the file."""
        path = self._reader.file_of(name)
        if path not in self._files:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                self._files[path] = MappedFile(path), 8 + length, json.loads(file.read(length))
        numbers, start, header = self._files[path]
        dtype = _DTYPES.get(header[name]["dtype"])
        if dtype is None:
            return self._reader.read(name)
        return numbers.tensor(start + header[name]["data_offsets"][0], dtype, header[name]["shape"])
