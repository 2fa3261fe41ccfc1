"""The planner's word on a run; the CPU platform must be installed."""

from __future__ import annotations

from megatron_pz.config.rules import validate
from megatron_pz.config.schema import Config
from megatron_pz.models.family import HfConfig
from megatron_pz.plan.assumptions import GIB, Assumptions
from megatron_pz.plan.layouts import Machines, Plan, Planner
from megatron_pz.plan.stages import build_stages
from megatron_pz.platform.host import available_memory


def planned(config: Config, hf_config: HfConfig, world_size: int, platform: str, gpu_memory_gib: float) -> Plan:
    """What the run takes; arguments as `Patient` has them. On a CPU the ranks share the memory that is free now.

    Raises:
        LayoutError, ConfigError, ModelError: as `Planner`.
    """
    validate(config, world_size)  # the planner divides by its sizes
    assumed = Assumptions(gpu_memory_gib=gpu_memory_gib or Assumptions.gpu_memory_gib)
    if platform == "cpu":
        free = available_memory() / GIB
        share = gpu_memory_gib or free / world_size
        assumed = Assumptions(gpu_memory_gib=share, reserve_gib=0.0, host_memory_gib=free)
    planner = Planner(hf_config, config, Machines(world_size, 1, platform == "cuda", assumed))
    return planner.plan(config, build_stages(hf_config, config, world_size))
