"""Weights as Hugging Face folders that trainer and servers both see."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_pz.engine.sglang.control import Control
from megatron_pz.engine.sglang.faults import ServerBusy, ServerRefused
from megatron_pz.sync.push import Receivers, Sent

RETRY_AFTER_S = 1.0
FILE_COPIES = 3
"""Of the tensors of a file in the writer's memory: as they are, as bytes, and the parameter that comes next, made whole."""


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
        receivers.each(lambda control: self._read(control, folder, version))
        num_bytes = 0
        if self._is_rank0:
            num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            self._prune(folder)
        return Sent(num_bytes, 0)

    async def _read(self, control: Control, folder: Path, version: int) -> None:
        """Twice, if need be: what one machine has renamed another may not see at once."""
        for attempt in (1, 2):
            try:
                return await control.update_weights_from_disk(str(folder), str(version), flush_cache=self._flushes)
            except (ServerRefused, ServerBusy):
                if attempt == 2:
                    raise
            await asyncio.sleep(RETRY_AFTER_S)

    def _prune(self, newest: Path) -> None:
        """Leave `newest` and the one before it; also away with later ones, of a run that went on from an earlier step,
        and with what a run that was killed had begun to write."""
        earlier = sorted(folder for folder in self._folder.glob("v*") if folder < newest)
        for pattern in ("v*", ".tmp-v*", ".old-v*"):
            for folder in self._folder.glob(pattern):
                if folder not in (newest, *earlier[-1:]):
                    shutil.rmtree(folder, ignore_errors=True)
