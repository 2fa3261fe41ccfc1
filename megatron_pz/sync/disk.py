"""Weights as Hugging Face folders that trainer and servers both see."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_pz.sync.push import Receivers, Sent


class DiskTransport:
    """Writes a folder a version, whole or not at all, and has the servers read it. The newest two stay.

    Args:
        write: puts the folder there under a temporary name and renames it; all ranks call it.
        folder: where, on a file system that the servers see too.
        is_rank0: this rank removes old folders.
        flushes: whether servers forget cached prefixes as they read.
    """

    def __init__(self, write: Callable[[Any, Path], None], folder: Path, is_rank0: bool, flushes: bool) -> None:
        self._write, self._folder, self._is_rank0, self._flushes = write, folder.resolve(), is_rank0, flushes

    def send(self, weights: Any, version: int, receivers: Receivers) -> Sent:
        """See `sync.push.Transport`. A server that cannot read the folder keeps its weights until it is restarted."""
        folder = self._folder / f"v{version:06d}"
        self._write(weights, folder)
        receivers.each(
            lambda control: control.update_weights_from_disk(str(folder), str(version), flush_cache=self._flushes)
        )
        num_bytes = 0
        if self._is_rank0:
            num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            for old in sorted(self._folder.glob("v*"))[:-2]:
                shutil.rmtree(old, ignore_errors=True)
        return Sent(num_bytes, 0)
