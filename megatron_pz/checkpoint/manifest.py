"""What a checkpoint consists of: every file with its size and SHA-256, and whose it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_pz.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = "megatron_pz checkpoint 1"


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(hf_config: Mapping[str, Any]) -> str:
    """What makes two models the same shape: config.json without what only describes how it was saved."""
    left_out = {"torch_dtype", "dtype", "transformers_version", "_name_or_path", "architectures"}
    kept = {name: value for name, value in hf_config.items() if name not in left_out}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path, facts: Mapping[str, Any], digests: Mapping[str, str] | None = None) -> None:
    """List every file under `folder` in its `manifest.json`, with `facts` about the run.

    Args:
        digests: by relative name, of files whose SHA-256 is known already.
    """
    files = {
        name: {"bytes": path.stat().st_size, "sha256": (digests or {}).get(name) or sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (name := str(path.relative_to(folder))) != MANIFEST
    }
    text = json.dumps({"format": FORMAT, **facts, "files": files}, indent=1)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def check_manifest(folder: Path, model: str) -> dict[str, Any]:
    """The manifest of `folder`, once every file is there as it was written.

    Args:
        model: fingerprint of the model that is to be loaded.

    Raises:
        CheckpointError: a file is missing, shorter, longer or altered; or the checkpoint is not ours or another model's.
    """
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} has no readable {MANIFEST} ({error}); it is no whole checkpoint of ours. Move it away."
        ) from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise CheckpointError(f"{folder}: format is {found!r}, wanted {FORMAT!r}. Move it away.")
    if manifest.get("model") != model:
        raise CheckpointError(
            f"{folder} belongs to another model (config.json differs); give this run another --run-dir."
        )
    for name, facts in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{folder} is damaged: {name} is missing.")
        if file.stat().st_size != facts["bytes"]:
            raise CheckpointError(
                f"{folder} is damaged: {name} has {file.stat().st_size} bytes, was written with {facts['bytes']}."
            )
        if sha256(file) != facts["sha256"]:
            raise CheckpointError(f"{folder} is damaged: {name} was altered after it was written.")
    return manifest
