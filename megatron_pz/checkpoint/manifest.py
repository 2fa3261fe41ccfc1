"""What a checkpoint consists of: every file with its size and checksum, and whose it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_pz.checkpoint import checksum
from megatron_pz.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = "megatron_pz checkpoint 3"
READABLE = (FORMAT, "megatron_pz checkpoint 2", "megatron_pz checkpoint 1")
"""2: SHA-256 of every file. 1: optimizer state under Megatron's own names as well, which differ between layouts."""
SHOWN = 8

Advance = Callable[[int], None]
"""Told the bytes that were done."""


def fingerprint(hf_config: Mapping[str, Any]) -> str:
    """What makes two models the same shape: config.json without what only describes how it was saved."""
    left_out = {"torch_dtype", "dtype", "transformers_version", "_name_or_path", "architectures"}
    kept = {name: value for name, value in hf_config.items() if name not in left_out}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path, facts: Mapping[str, Any], known: Mapping[str, str] | None = None) -> None:
    """List every file under `folder` in its `manifest.json`, with `facts` about the run.

    Args:
        known: checksums by relative name, of files that were summed already.
    """
    files = {
        name: {"bytes": path.stat().st_size, "checksum": (known or {}).get(name) or checksum.of_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (name := str(path.relative_to(folder))) != MANIFEST
    }
    text = json.dumps({"format": FORMAT, **facts, "files": files}, indent=1)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def read_manifest(folder: Path, model: str | None = None) -> dict[str, Any]:
    """The manifest of `folder`; no other file is looked at.

    Args:
        model: fingerprint of the model that is to be loaded; None: any will do.

    Raises:
        CheckpointError: the checkpoint is not ours or another model's.
    """
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} has no readable {MANIFEST} ({error}); it is no whole checkpoint of ours. Move it away."
        ) from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found not in READABLE:
        raise CheckpointError(f"{folder}: format is {found!r}, wanted {FORMAT!r}. Move it away.")
    if model is not None and manifest.get("model") != model:
        raise CheckpointError(
            f"{folder} belongs to another model (config.json differs); give this run another --run-dir."
        )
    return manifest


def damage(
    folder: Path, files: Mapping[str, Mapping[str, Any]], *, threads: int = 1, advance: Advance = lambda _: None
) -> list[str]:
    """What is wrong with each file of a manifest that is not as it was written; in the manifest's order.

    Args:
        threads: files that are read at a time.
        advance: told the bytes that were read.
    """
    with ThreadPoolExecutor(threads) as pool:
        told = pool.map(lambda item: _damage(folder, item[0], item[1], advance), files.items())
        return [fault for fault in told if fault]


def share(files: Mapping[str, Mapping[str, Any]], rank: int, size: int) -> dict[str, Mapping[str, Any]]:
    """The files that `rank` of `size` ranks reads, so that all have about the same bytes."""
    loads = [0] * size
    mine = {}
    for name, facts in sorted(files.items(), key=lambda item: (-item[1]["bytes"], item[0])):
        least = loads.index(min(loads))
        loads[least] += facts["bytes"]
        if least == rank:
            mine[name] = facts
    return mine


def refuse(folder: Path, faults: Sequence[str]) -> None:
    """Raise what `damage` found, if it found something.

    Raises:
        CheckpointError: with the first few faults.
    """
    if faults:
        more = f" and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise CheckpointError(f"{folder} is damaged: {'; '.join(faults[:SHOWN])}{more}.")


def _damage(folder: Path, name: str, facts: Mapping[str, Any], advance: Advance) -> str | None:
    file = folder / name
    if not file.is_file():
        return f"{name} is missing"
    if (size := file.stat().st_size) != facts["bytes"]:
        return f"{name} has {size} bytes, was written with {facts['bytes']}"
    wanted = checksum.stored(facts)
    try:
        found = checksum.of_file(file, wanted.partition(":")[0], advance)
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None if found == wanted else f"{name} was altered after it was written"
