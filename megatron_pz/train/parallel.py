"""This process's place among the ranks: torch.distributed and Megatron's groups, started and stopped.

Ranks come from torchrun's (or srun's) environment; without it the process is a world of its own and needs no port.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch.distributed.rendezvous import rendezvous

from megatron_pz.config.schema import ParallelConfig
from megatron_pz.errors import LayoutError
from megatron_pz.models.transformer import expert_tensor_size, virtual_size
from megatron_pz.platform.base import Platform

TIMEOUT = timedelta(hours=1)
"""How long a rank waits for the others. Long, because rank 0 may play or write for a while; torchrun ends the rest at
once where a rank dies."""


@dataclass(frozen=True, eq=False)
class Parallel:
    """Where this rank stands. Sizes are of the groups; `dp` counts replicas of the dense model."""

    rank: int
    world_size: int
    dp_rank: int
    dp_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    num_chunks: int  # model chunks of a pipeline rank
    device: torch.device
    dp_rank_of: tuple[int, ...]  # of every rank of the world
    control_group: dist.ProcessGroup  # all ranks; carries Python objects through CPU memory

    @property
    def is_rank0(self) -> bool:
        """Whether this rank plays the game and writes the journal."""
        return self.rank == 0

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank has the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the head, and so the loss."""
        return self.pp_rank == self.pp_size - 1


def init_parallel(config: ParallelConfig, platform: Platform, seed: int) -> Parallel:
    """Start the process groups of `config`'s layout and Megatron's random states.

    Collective: every rank calls it. After `shutdown` it may be called again, with another layout.

    Args:
        config: sizes of the layout; the rest of the ranks are data-parallel.
        platform: installed; its backend carries the collectives.
        seed: of dropout and of Megatron's own initialisation.

    Raises:
        LayoutError: the number of ranks is no multiple of what a model needs.
    """
    if not dist.is_initialized():
        _init_distributed(platform)
    start_groups(config)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    control_group = dist.group.WORLD if platform.backend == "gloo" else dist.new_group(backend="gloo", timeout=TIMEOUT)
    assert control_group is not None
    dp_rank_of: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(dp_rank_of, parallel_state.get_data_parallel_rank(), group=control_group)
    return this_rank(config, platform, dp_rank_of, control_group)


def start_groups(config: ParallelConfig, *, with_gloo: bool = True) -> None:
    """Start Megatron's groups of `config`'s layout over the ranks of torch.distributed, which must be up.

    Args:
        with_gloo: also start groups that carry tensors of host memory (for checkpoints of the distributed optimizer).

    Raises:
        LayoutError: the number of ranks is no multiple of what a model needs.
    """
    _check_world(config, dist.get_world_size())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_size(config),
        context_parallel_size=config.context_parallel_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
        expert_tensor_parallel_size=expert_tensor_size(config),
        distributed_timeout_minutes=int(TIMEOUT.total_seconds() // 60),
        create_gloo_process_groups=with_gloo,
    )


def this_rank(
    config: ParallelConfig, platform: Platform, dp_rank_of: Sequence[int], control_group: dist.ProcessGroup
) -> Parallel:
    """This rank's place in Megatron's groups, which are up."""
    return Parallel(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        num_chunks=config.virtual_pipeline_model_parallel_size,
        device=platform.device,
        dp_rank_of=tuple(dp_rank_of),
        control_group=control_group,
    )


def shutdown() -> None:
    """Take down Megatron's groups and torch.distributed. Does nothing where they are not up."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _init_distributed(platform: Platform) -> None:
    device = platform.device if platform.backend == "nccl" else None
    store: dist.Store = dist.HashStore()
    rank, world_size = 0, 1
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        store, rank, world_size = next(rendezvous("env://", timeout=TIMEOUT))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # After a restart torchrun offers the same store, in which the addresses of the ranks that died stand. With several
            # launchers, which count restarts each for itself, examples/launch.sh has them offer a new one.
            store = dist.PrefixStore(f"start{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(
        platform.backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT, device_id=device
    )


def _check_world(config: ParallelConfig, world_size: int) -> None:
    pipeline = config.pipeline_model_parallel_size
    model = config.tensor_model_parallel_size * config.context_parallel_size * pipeline
    experts = expert_tensor_size(config) * config.expert_model_parallel_size * pipeline
    for what, size in (("one model takes tensor x context x pipeline", model), ("its experts take", experts)):
        if world_size % size:
            raise LayoutError(
                f"parallel: {world_size} ranks were started, but {what} = {size}, which must divide them; "
                f"start a multiple of {size} ranks, or make the sizes of [parallel] smaller."
            )
