"""Bytes that a run writes of its model: checkpoints and Hugging Face folders on disk, and the copy in host memory of async_save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_pz.config.schema import Config
from megatron_pz.plan.assumptions import GIB, Assumptions
from megatron_pz.plan.stages import Stage
from megatron_pz.platform.base import torch_dtype

FLOAT32 = 4
SYNC_FOLDERS = 3
"""Of `sync.disk.DiskTransport`: the newest two, and the one that is written."""


@dataclass(frozen=True)
class Saves:
    """Host memory is a bound: as if every rank of a node wrote its weights, which one of those that hold the same does."""

    checkpoint_bytes: int
    weights_bytes: int  # of a Hugging Face folder
    num_on_disk: int  # at the fullest moment: those that are kept, and the new one
    host_bytes: int  # of a node; 0 where training waits for the files

    def line(self) -> str:
        """For the table."""
        disk = self.checkpoint_bytes * self.num_on_disk
        text = f"a checkpoint: {self.checkpoint_bytes / GIB:.1f} GiB on disk, {disk / GIB:.1f} with those that are kept"
        text += f"; hf/: {self.weights_bytes / GIB:.1f}"
        if self.host_bytes:
            text += f"; its copy under async_save: at most {self.host_bytes / GIB:.1f} GiB of a node's host memory"
        return text


def saves(stages: Sequence[Stage], config: Config, model_parameters: int, assumed: Assumptions) -> Saves:
    """What `checkpoint.store` writes: weights, two moments in float32, and masters where weights are narrower.

    Args:
        model_parameters: of the whole model.
    """
    width = torch_dtype(config.model.params_dtype).itemsize
    state = 2 * FLOAT32 + (FLOAT32 if width < FLOAT32 else 0)
    host = 0
    if config.checkpoint.async_save:
        ranks = (
            sum(buffer.num_parameters * width + buffer.shard_parameters * state for buffer in stage.buffers)
            for stage in stages
        )
        host = max(ranks) * assumed.gpus_per_node
    return Saves(model_parameters * (width + state), model_parameters * width, config.checkpoint.keep + 1, host)


@dataclass(frozen=True)
class Room:
    """What a run wants of the disk beyond what it has there, at its fullest moment."""

    num_checkpoints: int  # more than there are
    num_folders: int  # of weights, in Hugging Face's format
    wanted_bytes: int


def room(saved: Saves, config: Config, steps_there: Sequence[int] = ()) -> Room:
    """The fuller of two moments: the last checkpoint that is new before an old one goes, and `hf/`, which is written after
    all of them and beside the one that may be there.

    Args:
        steps_there: of the checkpoints on disk, ascending.
    """
    there, keep, last = len(steps_there), config.checkpoint.keep, config.train.train_iters
    done, interval = (steps_there[-1] if there else 0), config.checkpoint.save_interval
    num_saves = 0
    if done < last:  # at multiples of the interval, and at the end
        num_saves = (last // interval - done // interval if interval else 0) + (not interval or last % interval > 0)
    sglang = config.sglang if config.engine.engine == "sglang" else None
    synced = SYNC_FOLDERS if sglang and sglang.weight_transport == "disk" else 0
    moments = [(min(there + num_saves, max(keep, there) + 1) - there, synced)]
    if config.checkpoint.export_hf:
        moments.append((min(there + num_saves, keep) - there if num_saves else 0, synced + 1))
    rooms = [Room(more, made, more * saved.checkpoint_bytes + made * saved.weights_bytes) for more, made in moments]
    return max(rooms, key=lambda found: found.wanted_bytes)
