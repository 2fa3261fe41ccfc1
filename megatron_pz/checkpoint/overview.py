"""What is in a checkpoint, read from its index and manifest alone: no weights are loaded, whatever their size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_pz.checkpoint.manifest import MANIFEST, Advance, damage, read_manifest
from megatron_pz.checkpoint.optimizer_state import PREFIX
from megatron_pz.checkpoint.pieces import PieceReader
from megatron_pz.checkpoint.store import SHARDS
from megatron_pz.errors import CheckpointError

GIB = 1024**3
SIZES = ("tensor_model", "pipeline_model", "virtual_pipeline_model", "expert_model", "expert_tensor", "context")


@dataclass(frozen=True)
class SavedTensor:
    """A whole tensor, however many ranks wrote it."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    num_pieces: int
    is_optimizer: bool

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Overview:
    """What is told of a checkpoint."""

    folder: Path
    manifest: dict[str, Any]
    tensors: tuple[SavedTensor, ...]  # by key
    index_fault: str  # why the index cannot be read, if so; there are no tensors then

    @property
    def weights(self) -> list[SavedTensor]:
        return [tensor for tensor in self.tensors if not tensor.is_optimizer]

    @property
    def has_optimizer(self) -> bool:
        return any(tensor.is_optimizer for tensor in self.tensors)

    @property
    def num_bytes(self) -> int:
        """Of all files in the manifest."""
        return sum(int(facts["bytes"]) for facts in self.manifest["files"].values())

    @property
    def visible_damage(self) -> list[str]:
        """What is wrong as far as can be seen without reading the files."""
        missing = [f"{name} is missing" for name in self.manifest["files"] if not (self.folder / name).is_file()]
        return missing or [self.index_fault] * bool(self.index_fault)


def overview(folder: Path) -> Overview:
    """The overview of a checkpoint of a run, or of a converted one.

    Raises:
        CheckpointError: `folder` is none of ours; with a hint where it has some in it.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder. Name a step_NNNNNN folder of a run, or a converted checkpoint.")
    if not (folder / MANIFEST).is_file():
        inside = sorted(path for path in [*folder.glob("step_*"), *folder.glob("checkpoints/step_*")] if path.is_dir())
        hint = f" Did you mean {inside[-1]}?" if inside else ""
        raise CheckpointError(f"{folder} is no checkpoint of ours: it has no {MANIFEST}.{hint}")
    manifest = read_manifest(folder)
    try:
        reader = PieceReader(folder / SHARDS)
    except CheckpointError as error:
        return Overview(folder, manifest, (), str(error))
    tensors = (
        SavedTensor(
            key,
            str(reader.dtype(key)).removeprefix("torch."),
            reader.shape(key),
            reader.num_pieces(key),
            key.startswith((f"{PREFIX}.", "chained_")),
        )
        for key in sorted(reader.tensor_keys())
    )
    return Overview(folder, manifest, tuple(tensors), "")


def lines(found: Overview, *, with_tensors: bool = True) -> list[str]:
    """The overview as text."""
    manifest, weights = found.manifest, found.weights
    layout = manifest.get("layout", {})
    sizes = [
        f"{name.replace('_', ' ')} {layout[f'{name}_parallel_size']}"
        for name in SIZES
        if f"{name}_parallel_size" in layout
    ]
    known = manifest.get("optimizer")
    told = "none: weights only, for --load"
    if found.has_optimizer:
        told = "yes" + (f", after {known['step']} updates" if known else "")
    versions = ", ".join(f"{name} {value}" for name, value in manifest.get("versions", {}).items())
    dtypes = sorted({tensor.dtype for tensor in weights})
    head = [
        ("checkpoint", f"{found.folder}  ({manifest['format']})"),
        ("step", str(manifest.get("step"))),
        ("model", f"{manifest.get('model_type', 'of fingerprint')} {str(manifest.get('model'))[:12]}"),
        ("written by", f"{layout.get('world_size', '?')} ranks{': ' if sizes else ''}{', '.join(sizes)}; {versions}"),
        ("parameters", f"{sum(tensor.numel for tensor in weights):,} as {', '.join(dtypes)}"),
        ("optimizer", told),
        ("files", f"{len(manifest['files'])} of {found.num_bytes:,} bytes ({found.num_bytes / GIB:.2f} GiB)"),
    ]
    rows = [f"{name:<12}{value}" for name, value in head]
    return rows + ["", *_table(found.tensors)] if with_tensors else rows


def extra_files(found: Overview) -> list[str]:
    """Files that are in the folder and not in the manifest. They do no harm."""
    listed = set(found.manifest["files"]) | {MANIFEST}
    names = (str(path.relative_to(found.folder)) for path in sorted(found.folder.rglob("*")) if path.is_file())
    return [name for name in names if name not in listed]


def verify(found: Overview, *, threads: int = 1, advance: Advance = lambda _: None) -> list[str]:
    """What is wrong with each file that is not as it was written."""
    return damage(found.folder, found.manifest["files"], threads=threads, advance=advance)


def _table(tensors: Sequence[SavedTensor]) -> list[str]:
    rows = [
        (
            tensor.key,
            tensor.dtype,
            "x".join(map(str, tensor.shape)),
            f"{tensor.num_pieces} piece{'s' * (tensor.num_pieces > 1)}",
        )
        for tensor in tensors
    ]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(4)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
