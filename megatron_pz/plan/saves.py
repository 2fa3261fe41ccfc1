"""Bytes of a checkpoint: on disk, and of its copy in host memory under `checkpoint.async_save`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_pz.config.schema import Config
from megatron_pz.plan.assumptions import GIB, Assumptions
from megatron_pz.plan.stages import Stage
from megatron_pz.platform.base import torch_dtype

FLOAT32 = 4


@dataclass(frozen=True)
class Saves:
    """Host memory is a bound: as if every rank of a node wrote its weights, which one of those that hold the same does."""

    checkpoint_bytes: int
    num_on_disk: int  # at the fullest moment: those that are kept, and the new one
    host_bytes: int  # of a node; 0 where training waits for the files

    def line(self) -> str:
        """For the table."""
        disk = self.checkpoint_bytes * self.num_on_disk
        text = f"a checkpoint: {self.checkpoint_bytes / GIB:.1f} GiB on disk, {disk / GIB:.1f} with those that are kept"
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
    return Saves(model_parameters * (width + state), config.checkpoint.keep + 1, host)
