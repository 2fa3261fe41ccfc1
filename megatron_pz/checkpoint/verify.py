"""A checkpoint verified by all ranks together: each reads a share of its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_pz.checkpoint.manifest import damage, read_manifest, refuse, share
from megatron_pz.errors import CheckpointError


def verified(folder: Path, model: str, group: Any = None) -> dict[str, Any]:
    """The manifest of a checkpoint, once every file is there as it was written. Collective: ranks read a share each.

    Args:
        model: fingerprint of the model that is to be loaded.
        group: gloo group of all ranks; None: this process reads all.

    Raises:
        CheckpointError: on every rank, if a file is damaged or missing, or the checkpoint is not ours or another model's.
    """
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    manifest: dict[str, Any] = {}
    refused: CheckpointError | None = None
    faults: list[str] = []
    try:
        manifest = read_manifest(folder, model)
        faults = damage(folder, share(manifest["files"], rank, size))
    except CheckpointError as error:
        refused = error
    everywhere: list[Any] = [(refused, faults)]
    if group is not None:
        everywhere = [None] * size
        dist.all_gather_object(everywhere, (refused, faults), group=group)
    for found, _ in everywhere:
        if found is not None:
            raise found
    refuse(folder, [fault for _, found in everywhere for fault in found])
    return manifest
