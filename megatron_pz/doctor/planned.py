"""The planner's word on a run; the CPU platform must be installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_pz.config.rules import validate
from megatron_pz.plan.assumptions import GIB, Assumptions
from megatron_pz.plan.layouts import Machines, Plan, Planner
from megatron_pz.plan.stages import build_stages
from megatron_pz.platform.host import available_memory

if TYPE_CHECKING:
    from megatron_pz.doctor.patient import Patient


def planned(patient: Patient) -> Plan:
    """What the run takes. On a CPU the ranks share the memory that is free now.

    Raises:
        LayoutError, ConfigError, ModelError: as `Planner`.
    """
    validate(patient.config, patient.world_size)  # the planner divides by its sizes
    assumed = Assumptions(gpu_memory_gib=patient.gpu_memory_gib or Assumptions.gpu_memory_gib)
    if patient.platform == "cpu":
        free = available_memory() / GIB
        share = patient.gpu_memory_gib or free / patient.world_size
        assumed = Assumptions(gpu_memory_gib=share, reserve_gib=0.0, host_memory_gib=free)
    machines = Machines(patient.world_size, 1, patient.platform == "cuda", assumed)
    planner = Planner(patient.hf_config, patient.config, machines)
    return planner.plan(patient.config, build_stages(patient.hf_config, patient.config, patient.world_size))
