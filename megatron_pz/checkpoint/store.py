"""Checkpoints of a run: whole or not at all, the newest few kept.

1. A checkpoint is written under `.tmp-step_N` and renamed to `step_N` once every file and the manifest are on disk.
2. A killed save leaves only a `.tmp-` folder, which the next start removes.
3. Older checkpoints go only after the new one stands.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from megatron_pz.checkpoint.extra_state import drop_absent_states, load_state
from megatron_pz.checkpoint.manifest import check_manifest, fingerprint, write_manifest
from megatron_pz.errors import CheckpointError, DiskError
from megatron_pz.models.quantized import fill
from megatron_pz.models.shards import complete_weights, unwrap

STATE = "run_state.json"
SHARDS = "shards"
_NAME = re.compile(r"step_(\d+)")
SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}


class CheckpointStore:
    """Saves and loads model, optimizer and a small JSON text. Every rank makes one; methods are collective.

    Args:
        folder: `checkpoints/` of the run directory.
        keep: newest checkpoints that stay.
        group: gloo group of all ranks; None with one process.
    """

    def __init__(self, folder: Path, keep: int, group: Any = None) -> None:
        self.folder, self.keep, self._group = folder, keep, group
        self._is_rank0 = not dist.is_initialized() or dist.get_rank() == 0
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
    ) -> Path:
        """Write `step_N` and drop what is too old.

        Args:
            drops_old: whether older ones may go; a state that came to grief is kept beside all that went before.

        Raises:
            DiskError: no room or no right; older checkpoints are untouched.
        """
        final = self.folder / f"step_{step:06d}"
        partial = self.folder / f".tmp-{final.name}"
        self._on_rank0(lambda: self._prepare(partial, chunks), final, partial)
        complete_weights(chunks)
        try:
            dist_checkpointing.save(_sharded(chunks, optimizer, is_loading=False), str(partial / SHARDS))
        except (
            OSError,
            RuntimeError,
            CheckpointException,
        ) as error:  # torch's writers have only RuntimeError to say it
            raise self._fault(error, final, partial) from error
        self._on_rank0(lambda: self._seal(partial, final, state, self._facts(step, chunks)), final, partial)
        if self._is_rank0 and drops_old:
            self._drop_old()
        self._barrier()
        return final

    def load(self, step: int, chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer) -> str:
        """Put model and optimizer back as they were at `step`; returns the JSON text that was saved.

        Raises:
            CheckpointError: it is damaged or foreign; nothing was loaded. Other whole checkpoints are named.
        """
        folder = self.folder / f"step_{step:06d}"
        model = fingerprint(unwrap(chunks[0]).hf_config)
        try:
            check_manifest(folder, model)
        except CheckpointError as error:
            others = [other for other in self.steps() if other != step and self._is_whole(other, model)]
            hint = f" step_{others[-1]:06d} is whole: move {folder.name} away to go on from there." if others else ""
            raise CheckpointError(f"{error}{hint}") from error
        wanted = _sharded(chunks, optimizer, is_loading=True)
        drop_absent_states(wanted, folder / SHARDS)
        loaded = dist_checkpointing.load(wanted, str(folder / SHARDS))
        for index, chunk in enumerate(chunks):
            load_state(unwrap(chunk), loaded[f"model{index}"])
        _keep_learning_rates(loaded["optimizer"], optimizer)
        optimizer.load_state_dict(loaded["optimizer"])
        _separate_steps(optimizer)
        return (folder / STATE).read_text(encoding="utf-8")

    def _prepare(self, partial: Path, chunks: Sequence[torch.nn.Module]) -> None:
        (partial / SHARDS).mkdir(parents=True, exist_ok=True)
        self._check_room(chunks)

    def _seal(self, partial: Path, final: Path, state: str, facts: dict[str, Any]) -> None:
        """From here on the checkpoint is there, or the one of the same step that it replaces."""
        (partial / STATE).write_text(state, encoding="utf-8")
        write_manifest(partial, facts)
        _sync(partial)
        replaced = self.folder / f".old-{final.name}"
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
        _sync_folder(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)

    def _on_rank0(self, stage: Callable[[], None], final: Path, partial: Path) -> None:
        """Run `stage` on rank 0; where it fails, no rank goes on."""
        fault: OSError | None = None
        if self._is_rank0:
            try:
                stage()
            except OSError as error:
                fault = error
        failed = torch.tensor([int(fault is not None)])
        if self._group is not None:
            dist.all_reduce(failed, dist.ReduceOp.MAX, group=self._group)
        if failed.item():
            raise self._fault(fault or OSError("rank 0 could not write"), final, partial) from fault

    def _fault(self, error: BaseException, final: Path, partial: Path) -> DiskError:
        """The error to raise, once the part that was written is gone."""
        if self._is_rank0:
            shutil.rmtree(partial, ignore_errors=True)
        cause = _first_cause(error)
        told = cause.strerror if isinstance(cause, OSError) and cause.strerror else cause
        free = shutil.disk_usage(self.folder).free
        return DiskError(
            f"{final}: the checkpoint could not be written ({told}); {free} bytes are free. "
            "Older checkpoints are untouched: free some room and start again."
        )

    def _facts(self, step: int, chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
        config = unwrap(chunks[0]).config
        return {
            "step": step,
            "model": fingerprint(unwrap(chunks[0]).hf_config),
            "layout": {
                "tensor_model_parallel_size": config.tensor_model_parallel_size,
                "pipeline_model_parallel_size": config.pipeline_model_parallel_size,
                "expert_model_parallel_size": config.expert_model_parallel_size,
                "world_size": dist.get_world_size() if dist.is_initialized() else 1,
            },
            "versions": {name: version(name) for name in ("megatron-core", "torch")},
        }

    def _check_room(self, chunks: Sequence[torch.nn.Module]) -> None:
        """Stop before writing where weights and two moments in float32 cannot fit."""
        parameters = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
        needed, free = 12 * parameters, shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: about {needed} bytes are needed")

    def _is_whole(self, step: int, model: str) -> bool:
        try:
            check_manifest(self.folder / f"step_{step:06d}", model)
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


def load_weights(chunks: Sequence[torch.nn.Module], folder: Path) -> None:
    """Fill the chunks with the weights of a checkpoint, with or without an optimizer, saved under any layout. Collective.

    Raises:
        CheckpointError: it is damaged, or of another model.
    """
    check_manifest(folder, fingerprint(unwrap(chunks[0]).hf_config))
    wanted = {f"model{index}": unwrap(chunk).sharded_state_dict() for index, chunk in enumerate(chunks)}
    drop_absent_states(wanted, folder / SHARDS)
    loaded = dist_checkpointing.load(wanted, str(folder / SHARDS))
    for index, chunk in enumerate(chunks):
        policy, state = unwrap(chunk), loaded[f"model{index}"]
        load_state(policy, state)
        for name, parameter in policy.named_parameters():
            fill(parameter, state[name])


def _sharded(chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer, *, is_loading: bool) -> dict[str, Any]:
    """Megatron's description of everything that is saved, as pieces of whole tensors."""
    model = {f"model{index}": unwrap(chunk).sharded_state_dict() for index, chunk in enumerate(chunks)}
    flat = model["model0"] if len(model) == 1 else {f"{k}.{n}": v for k, part in model.items() for n, v in part.items()}
    state = optimizer.sharded_state_dict(flat, is_loading=is_loading, metadata=SHARDING)
    return {**model, "optimizer": state}


def _keep_learning_rates(state: Any, optimizer: MegatronOptimizer) -> None:
    """Have the saved groups of parameters name this run's bounds of the learning rate, which are settings and may change.

    megatron-core 0.19 looks a group up by them, and fails where they differ; every step sets the rate itself.
    """
    if isinstance(state, dict):
        for group in state.get("param_groups", ()):
            group |= {name: optimizer.param_groups[0][name] for name in ("max_lr", "min_lr") if name in group}
        for part in state.values():
            _keep_learning_rates(part, optimizer)


def _separate_steps(optimizer: MegatronOptimizer) -> None:
    """Give every parameter a step count of its own.

    Without Transformer Engine Megatron loads one tensor for all of them, which torch's Adam then adds 1 to once for
    every parameter.
    """
    for part in optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]:
        for state in part.optimizer.state.values() if part.optimizer else ():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()


def _first_cause(error: BaseException) -> object:
    """What a failed save says of its first rank; Megatron hands on the ranks' errors to the one that gathers them."""
    if not isinstance(error, CheckpointException):
        return error
    return next((failure[0] for failure in error.failures.values()), "another rank failed")


def _sync(folder: Path) -> None:
    """Have every file of `folder` on disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
