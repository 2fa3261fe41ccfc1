"""The CPU: gloo, Megatron's local layers, and the shim that answers for CUDA. The reference of every other platform."""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import psutil
import torch

from megatron_pz.errors import ConfigError
from megatron_pz.platform import harmless, shim, transformer_engine
from megatron_pz.platform.base import Platform

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig


class CpuPlatform(Platform):
    """Any machine, without an accelerator."""

    name: ClassVar[str] = "cpu"
    backend: ClassVar[Literal["gloo", "nccl"]] = "gloo"

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return shim.CPU

    def install(self) -> None:
        """Hide Transformer Engine, which cannot run here, and answer Megatron's calls of CUDA."""
        transformer_engine.hide()
        transformer_engine.silence_missing()
        harmless.silence(harmless.EVERYWHERE + harmless.ON_A_CPU)
        shim.install()

    def synchronize(self) -> None:
        """Return: nothing runs beside Python."""

    def memory_bytes(self) -> dict[str, int]:
        """Resident memory of this process, in bytes."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
        return {"allocated": psutil.Process().memory_info().rss, "peak": peak}

    def release_unused(self) -> None:
        """Return: the system has what was freed."""

    def begin_phase(self) -> None:
        """Return: a process's peak is that of its whole life."""

    def transformer_defaults(self, transformer_impl: str | None = None) -> dict[str, Any]:
        """No fused kernels; weights initialised on the CPU, whole and then cut, so that layouts start equal."""
        from megatron_pz.platform.local_spec import LOCAL_DEFAULTS

        if transformer_impl not in (None, "local"):
            raise ConfigError(
                f'transformer.transformer_impl is "{transformer_impl}"; on the platform cpu it must be "local": '
                "leave it out."
            )
        return {**LOCAL_DEFAULTS, "use_cpu_initialization": True}

    def layer_spec(self, config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
        """Megatron's local layers with packed attention and a norm that knows sequence parallelism."""
        from megatron_pz.platform.local_spec import local_layer_spec

        return local_layer_spec(config, vp_stage)
