"""The policy as a Hugging Face folder: config.json, tokenizer files and safetensors, whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_pz.errors import DiskError
from megatron_pz.sync.export import iterate_hf_tensors

COPIED = ("*.json", "*.model", "*.txt", "*.jinja", "README.md")
"""What goes along from the folder that the run began with; weights and their index do not."""


def export_hf(
    chunks: Sequence[torch.nn.Module],
    hf_dir: Path,
    out_dir: Path,
    *,
    dtype: torch.dtype | None = None,
    group: Any = None,
    is_rank0: bool = True,
) -> None:
    """Write `out_dir`, replacing an earlier export. All ranks call it, rank 0 writes.

    Args:
        chunks: this rank's model chunks.
        hf_dir: folder with config.json and the tokenizer.
        dtype: of the written tensors; None: that of the parameters.
        group: gloo group of all ranks.

    Raises:
        DiskError: no room or no right; an earlier export stays.
    """
    partial = out_dir.with_name(f".tmp-{out_dir.name}")
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in iterate_hf_tensors(chunks, group):
        tensors[name] = tensor.to(dtype or tensor.dtype).contiguous().clone()
    if not is_rank0:
        return
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for pattern in COPIED:
            for file in hf_dir.glob(pattern):
                if not file.name.endswith("safetensors.index.json"):
                    shutil.copyfile(file, partial / file.name)
        config = json.loads((hf_dir / "config.json").read_text(encoding="utf-8"))
        config["dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        config.pop("torch_dtype", None)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        shutil.rmtree(out_dir, ignore_errors=True)
        partial.rename(out_dir)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise DiskError(
            f"{out_dir}: the export could not be written: {error}. Free some room; nothing was lost."
        ) from error
