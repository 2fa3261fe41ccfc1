"""What a plan takes for granted of machines and texts: every number that is neither in the settings nor in the model."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

GIB = 1024**3


@dataclass(frozen=True)
class Assumptions:
    """Defaults: nodes of 8 H200 with one 400 Gb/s adapter a GPU. Each is a flag of tools/plan_layout.py."""

    gpu_memory_gib: float = 139.0  # that torch can use of an H200's 141 GB
    reserve_gib: float = 8.0  # CUDA context, NCCL's buffers, what the allocator loses between blocks
    sleeping_server_gib: float = 3.0  # that a colocated server keeps while the trainer works
    server_memory_fraction: float = (
        0.85  # of a server's GPU for weights and cache, where [server] mem-fraction-static is not set
    )
    host_memory_gib: float = 1900.0  # of a node
    gpus_per_node: int = 8
    peak_tflops: float = 989.0  # of a GPU, dense bfloat16
    mfu: float = 0.45  # of the peak, in the trainer's products; communication is added
    memory_tb_per_s: float = 4.8  # of a GPU's memory
    memory_efficiency: float = 0.6  # of it, while a server decodes
    node_gb_per_s: float = 350.0  # a GPU to others of its node, each way, reached
    network_gb_per_s: float = 40.0  # a GPU to other nodes, each way, reached
    host_gb_per_s: float = 40.0  # a GPU to host memory
    request_gb_per_s: float = 0.5  # weights in requests, to one server after the other
    disk_gb_per_s: float = 2.0  # a shared folder
    mean_prompt_tokens: float = 500.0
    mean_response_tokens: float = 1000.0
    trained_share: float = 0.7  # of the rollouts, whose groups are not flat
    expert_imbalance: float = 1.2  # tokens of the rank whose experts get most, over the mean

    def lines(self) -> list[str]:
        """Name and value of each."""
        return [f"{field.name.replace('_', '-')} {getattr(self, field.name):g}" for field in fields(self)]

    @staticmethod
    def flags() -> dict[str, Any]:
        """Name to default."""
        return {field.name: field.default for field in fields(Assumptions)}
