"""The policy as a Hugging Face folder: config.json, tokenizer files and safetensors, whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from megatron_pz.checkpoint.fp8 import all_encoded
from megatron_pz.checkpoint.hf_import import INDEX, SINGLE
from megatron_pz.config.fp8 import QUANTIZATION_CONFIG
from megatron_pz.errors import DiskError
from megatron_pz.sync.export import iterate_hf_tensors

COPIED = ("*.json", "*.model", "*.txt", "*.jinja", "README.md")
"""What goes along from the folder that the run began with; weights and their index do not."""

MAX_FILE_BYTES = 4 * 1024**3


def export_hf(
    chunks: Sequence[torch.nn.Module],
    hf_dir: Path,
    out_dir: Path,
    *,
    dtype: torch.dtype | None = None,
    group: Any = None,
    is_rank0: bool = True,
    max_file_bytes: int = MAX_FILE_BYTES,
    in_fp8: bool = False,
) -> None:
    """Write `out_dir`, replacing an earlier export. All ranks call it, rank 0 writes.

    Rank 0 holds at most the tensors of one file.

    Args:
        chunks: this rank's model chunks.
        hf_dir: folder with config.json and the tokenizer.
        dtype: of the written tensors; None: that of the parameters.
        group: gloo group of all ranks.
        max_file_bytes: a further file is begun before one grows larger; a single tensor always fits.
        in_fp8: quantise by blocks, as `checkpoint.fp8` says; with `dtype` None.

    Raises:
        DiskError: no room or no right (on rank 0); an earlier export stays.
    """
    partial = out_dir.with_name(f".tmp-{out_dir.name}")
    files = _TensorFiles(partial, max_file_bytes)
    tensors = iterate_hf_tensors(chunks, group)
    tensors = all_encoded(tensors) if in_fp8 else tensors
    fault: Exception | None = None
    try:
        if is_rank0:
            shutil.rmtree(partial, ignore_errors=True)
            copy_settings(hf_dir, partial)
    except OSError as error:
        fault = error
    for name, tensor in tensors:
        # After a fault too: the other ranks take part in every tensor.
        try:
            if fault is None:
                files.add(name, tensor.to(dtype or tensor.dtype).contiguous().clone())
        except (OSError, SafetensorError) as error:
            fault = error
    if not is_rank0:
        return
    try:
        if fault is None:
            files.finish()
            write_config(hf_dir, partial, files.dtype, {"quantization_config": QUANTIZATION_CONFIG} if in_fp8 else None)
            _replace(partial, out_dir)
    except (OSError, SafetensorError) as error:
        fault = error
    if fault is not None:
        shutil.rmtree(partial, ignore_errors=True)
        raise DiskError(
            f"{out_dir}: the export could not be written: {fault}. Free some room; nothing was lost."
        ) from fault


class _TensorFiles:
    """Safetensors files of bounded size in `folder`, named when their number is known."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.dtype: torch.dtype | None = None
        self._max_bytes = max_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._names: list[list[str]] = []  # of the tensors in each file written
        self._total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take a tensor; write what is held if this one would make it too much."""
        if self._pending and self._pending_bytes + tensor.nbytes > self._max_bytes:
            self._flush()
        self._pending[name] = tensor
        self._pending_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes
        self.dtype = self.dtype or tensor.dtype

    def finish(self) -> None:
        """Write the rest, give the files their names, and an index where there are several."""
        self._flush()
        count = len(self._names)
        if count == 1:
            self._part(0).rename(self.folder / SINGLE)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._names):
            final = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _flush(self) -> None:
        save_file(self._pending, self._part(len(self._names)), metadata={"format": "pt"})
        self._names.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number}.safetensors"


def copy_settings(hf_dir: Path, partial: Path) -> None:
    """Tokenizer, generation settings and licence text into `partial`."""
    partial.mkdir(parents=True, exist_ok=True)
    for pattern in COPIED:
        for file in hf_dir.glob(pattern):
            if not file.name.endswith("safetensors.index.json"):
                shutil.copyfile(file, partial / file.name)


def write_config(
    hf_dir: Path, partial: Path, dtype: torch.dtype | None, extra: Mapping[str, Any] | None = None
) -> None:
    """config.json with the dtype that was written, and `extra`."""
    config = json.loads((hf_dir / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    config |= extra or {}
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _replace(partial: Path, out_dir: Path) -> None:
    """`partial` in the place of `out_dir`, which stays whole until then."""
    old = out_dir.with_name(f".old-{out_dir.name}")
    shutil.rmtree(old, ignore_errors=True)
    if out_dir.exists():
        out_dir.rename(old)
    partial.rename(out_dir)
    shutil.rmtree(old, ignore_errors=True)
