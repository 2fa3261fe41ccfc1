"""One safetensors file, written tensor by tensor: the library's own writer holds a whole file in memory.

Format: eight bytes of length, a JSON header with each tensor's dtype, shape and place, then the numbers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
}
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
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def add(self, name: str, tensor: Tensor) -> None:
        """The next tensor."""
        wanted = self._rest.pop()
        assert wanted == (name, tensor.dtype, tuple(tensor.shape)), (wanted, name, tensor.dtype, tensor.shape)
        self._file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def close(self) -> None:
        """On disk, and complete."""
        assert not self._rest
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
