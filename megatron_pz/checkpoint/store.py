"""Checkpoints of a run: whole or not at all, the newest few kept.

1. A checkpoint is written under `.tmp-step_N` and renamed to `step_N` once every file and the manifest are on disk.
2. A killed save leaves only a `.tmp-` folder, which the next start removes.
3. Older checkpoints go only after the new one stands.

Each rank writes its own files, in a thread; in the background where asked, from a copy in host memory. (Megatron's own
asynchronous save forks writers that outlive a kill, starts a process a rank that imports the program again, and cannot take
checksums; its newest versions give it up.) What the ranks must agree on is agreed in the main thread, by `settle`.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from threading import Event
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer

from megatron_pz.checkpoint import optimizer_state
from megatron_pz.checkpoint.contents import load_model, load_optimizer, pieces_to_save, uncovered
from megatron_pz.checkpoint.durable import sync_files, sync_folder
from megatron_pz.checkpoint.manifest import fingerprint, write_manifest
from megatron_pz.checkpoint.pieces import write_index
from megatron_pz.checkpoint.verify import verified
from megatron_pz.checkpoint.writer import HostCopy, WrittenFile, num_bytes, write_files
from megatron_pz.errors import CheckpointError, DiskError
from megatron_pz.models.shards import complete_weights, unwrap
from megatron_pz.platform.host import available_memory

STATE = "run_state.json"
SHARDS = "shards"
_NAME = re.compile(r"step_(\d+)")
HEADROOM = 1.1
"""Of free host memory over what the copies of a node's ranks take."""

Tell = Callable[[str], None]
"""Shows the user a line."""


@dataclass(frozen=True, eq=False)
class _Pending:
    """A checkpoint whose files are being written."""

    final: Path
    partial: Path
    state: str
    facts: dict[str, Any]
    drops_old: bool
    files: Future[list[WrittenFile]]


class CheckpointStore:
    """Saves and loads model, optimizer and a small JSON text. Every rank makes one; methods are collective.

    Args:
        folder: `checkpoints/` of the run directory.
        keep: newest checkpoints that stay.
        group: gloo group of all ranks; None with one process.
    """

    def __init__(self, folder: Path, keep: int, group: Any = None) -> None:
        self.folder, self.keep, self._group = folder, keep, group
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._world_size = dist.get_world_size() if dist.is_initialized() else 1
        self._is_rank0 = self._rank == 0
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._given_up = Event()
        self._copy = HostCopy()
        self._pending: _Pending | None = None
        if self._is_rank0:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                for leftover in [*folder.glob(".tmp-*"), *folder.glob(".trash-*")]:
                    shutil.rmtree(leftover)
                for replaced in folder.glob(".old-*"):  # killed while another took its place
                    final = folder / replaced.name.removeprefix(".old-")
                    shutil.rmtree(replaced) if final.exists() else replaced.rename(final)
            except OSError as error:
                raise DiskError(
                    f"{folder} cannot be written: {error.strerror}. Give the run another --run-dir."
                ) from error
        self._barrier()

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, oldest first. Folders of other names are not looked at."""
        return sorted(int(found[1]) for path in self.folder.iterdir() if (found := _NAME.fullmatch(path.name)))

    def save(
        self,
        step: int,
        chunks: Sequence[torch.nn.Module],
        optimizer: MegatronOptimizer,
        state: str,
        *,
        drops_old: bool = True,
        in_background: bool = False,
        tell: Tell = lambda _: None,
    ) -> Path | None:
        """Write `step_N` and drop what is too old. An earlier save must be settled.

        Args:
            drops_old: whether older ones may go; a state that came to grief is kept beside all that went before.
            in_background: return once the state is copied; the checkpoint stands when `settle` has returned it. Where the hosts
                have no memory for the copy, it is written before this returns.

        Returns:
            The checkpoint; None while it is written in the background.

        Raises:
            DiskError: no room or no right; older checkpoints are untouched.
        """
        assert not self.is_saving
        final = self.folder / f"step_{step:06d}"
        partial = self.folder / f".tmp-{final.name}"
        complete_weights(chunks)
        pieces = pieces_to_save(chunks, optimizer)
        size, updates = num_bytes(pieces), optimizer_state.step_of(optimizer)
        total, updates = self._agreed(size, dist.ReduceOp.SUM), self._agreed(updates, dist.ReduceOp.MAX)
        self._on_rank0(lambda: self._prepare(partial, total), final, partial)
        if in_background and self._agreed(int(self._lacks_memory(size)), dist.ReduceOp.MAX):
            tell("a host has no memory for a copy of the state: the checkpoint is written before training goes on")
            in_background = False
        if in_background:
            pieces = self._copy.take(pieces)
        files = self._writer.submit(write_files, pieces, partial / SHARDS, self._rank, self._given_up)
        facts = self._facts(step, chunks) | {"optimizer": {"step": updates}}
        self._pending = _Pending(final, partial, state, facts, drops_old, files)
        return None if in_background else self.settle(wait=True)

    @property
    def is_saving(self) -> bool:
        """Whether a checkpoint waits to be settled; the same on every rank."""
        return self._pending is not None

    def settle(self, *, wait: bool) -> Path | None:
        """Let a checkpoint that is written in the background appear, once every rank has written its files.

        Args:
            wait: until they have; otherwise return at once where one has not.

        Returns:
            The checkpoint that appeared; None if none did.

        Raises:
            DiskError: some rank could not write; nothing of it is left, older checkpoints are untouched.
        """
        pending = self._pending
        if pending is None or (not wait and not self._agreed(int(pending.files.done()), dist.ReduceOp.MIN)):
            return None
        self._pending = None
        mine: list[WrittenFile] | OSError
        try:
            mine = pending.files.result()
        except OSError as error:
            mine = error
        except RuntimeError as error:
            mine = OSError(str(error))
        ranks = self._on_rank0_all(mine)
        self._on_rank0(lambda: self._seal(pending, ranks), pending.final, pending.partial)
        if self._is_rank0 and pending.drops_old:
            self._drop_old()
        self._barrier()
        return pending.final

    def close(self) -> None:
        """End the writer. What is still being written is finished where this is the only process; with others, who may be
        gone by now, it is given up, and older checkpoints stay."""
        if self._pending is not None and self._world_size == 1:
            try:
                self.settle(wait=True)
            except DiskError:
                self._pending = None  # the run is ending for a reason of its own, which is the one to tell
        self._given_up.set()
        self._writer.shutdown(cancel_futures=True)

    def load(self, step: int, chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer) -> str:
        """Put model and optimizer back as they were at `step`, saved under any layout; returns the JSON text that was saved.

        Raises:
            CheckpointError: it is damaged or foreign; nothing was loaded. Other whole checkpoints are named.
        """
        folder = self.folder / f"step_{step:06d}"
        model = fingerprint(unwrap(chunks[0]).hf_config)
        try:
            manifest = verified(folder, model, self._group)
        except CheckpointError as error:
            others = [other for other in self.steps() if other != step and self._is_whole(other, model)]
            hint = f" step_{others[-1]:06d} is whole: move {folder.name} away to go on from there." if others else ""
            raise CheckpointError(f"{error}{hint}") from error
        load_model(chunks, folder / SHARDS)
        load_optimizer(chunks, optimizer, folder / SHARDS, manifest)
        return (folder / STATE).read_text(encoding="utf-8")

    def _prepare(self, partial: Path, needed: int) -> None:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / SHARDS).mkdir(parents=True)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: about {needed} bytes are needed")

    def _seal(self, pending: _Pending, ranks: Sequence[list[WrittenFile] | OSError]) -> None:
        """From here on the checkpoint is there, or the one of the same step that it replaces."""
        files: list[WrittenFile] = []
        for found in ranks:
            if isinstance(found, OSError):
                raise found
            files += found
        assert not (lacking := uncovered([fact for file in files for fact in file.facts])), lacking
        partial, final = pending.partial, pending.final
        write_index(partial / SHARDS, {file.name: file.facts for file in files})
        (partial / STATE).write_text(pending.state, encoding="utf-8")
        known = {f"{SHARDS}/{file.name}": file.checksum for file in files}
        write_manifest(partial, pending.facts, known)
        sync_files(partial, known.keys())
        replaced = self.folder / f".old-{final.name}"
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
        sync_folder(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)

    def _on_rank0(self, stage: Callable[[], None], final: Path, partial: Path) -> None:
        """Run `stage` on rank 0; where it fails, what was written goes, and no rank goes on."""
        fault: OSError | None = None
        if self._is_rank0:
            try:
                stage()
            except OSError as error:
                shutil.rmtree(partial, ignore_errors=True)
                fault = error
        if self._agreed(int(fault is not None), dist.ReduceOp.MAX):
            raise self._fault(fault or OSError("rank 0 tells why"), final) from fault

    def _on_rank0_all(self, mine: list[WrittenFile] | OSError) -> list[list[WrittenFile] | OSError]:
        """What every rank has, on rank 0; nothing elsewhere."""
        if self._group is None:
            return [mine]
        gathered: list[Any] = [None] * self._world_size
        dist.gather_object(mine, gathered if self._is_rank0 else None, group=self._group)
        return gathered if self._is_rank0 else []

    def _agreed(self, number: int, how: Any) -> int:
        """The sum, least or most of all ranks' numbers."""
        if self._group is None:
            return number
        box = torch.tensor([number])
        dist.all_reduce(box, how, group=self._group)
        return int(box.item())

    def _lacks_memory(self, size: int) -> bool:
        on_host = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return self._copy.num_bytes == 0 and size * on_host * HEADROOM > available_memory()

    def _fault(self, error: OSError, final: Path) -> DiskError:
        free = shutil.disk_usage(self.folder).free
        return DiskError(
            f"{final}: the checkpoint could not be written ({error.strerror or error}); {free} bytes are free. "
            "Older checkpoints are untouched: free some room and start again."
        )

    def _facts(self, step: int, chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
        config = unwrap(chunks[0]).config
        names = ("tensor_model", "pipeline_model", "virtual_pipeline_model", "expert_model", "expert_tensor", "context")
        sizes = {f"{name}_parallel_size": getattr(config, f"{name}_parallel_size") or 1 for name in names}
        return {
            "step": step,
            "model": fingerprint(unwrap(chunks[0]).hf_config),
            "model_type": unwrap(chunks[0]).hf_config["model_type"],
            "layout": {**sizes, "world_size": self._world_size},
            "versions": {name: version(name) for name in ("megatron-core", "torch")},
        }

    def _is_whole(self, step: int, model: str) -> bool:
        try:
            verified(self.folder / f"step_{step:06d}", model, self._group)
        except CheckpointError:
            return False
        return True

    def _drop_old(self) -> None:
        for step in self.steps()[: -self.keep]:
            trash = self.folder / f".trash-step_{step:06d}"
            (self.folder / f"step_{step:06d}").rename(trash)
            shutil.rmtree(trash, ignore_errors=True)  # what is left goes at the next start

    def _barrier(self) -> None:
        if self._group is not None:
            dist.barrier(group=self._group)


def load_weights(chunks: Sequence[torch.nn.Module], folder: Path, group: Any = None) -> None:
    """Fill the chunks with the weights of a checkpoint, with or without an optimizer, saved under any layout. Collective.

    Args:
        group: gloo group of all ranks, which then share the verification; None: each reads all.

    Raises:
        CheckpointError: it is damaged, or of another model.
    """
    verified(folder, fingerprint(unwrap(chunks[0]).hf_config), group)
    load_model(chunks, folder / SHARDS)
