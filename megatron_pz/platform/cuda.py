"""NVIDIA GPUs: NCCL and Transformer Engine's layers, or the local layers where `transformer_impl = "local"` asks so."""

from __future__ import annotations

import gc
import importlib.util
import os
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from packaging.version import Version

from megatron_pz.errors import ConfigError
from megatron_pz.platform import engineless, harmless, shim, transformer_engine
from megatron_pz.platform.base import Platform

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig


class CudaPlatform(Platform):
    """One GPU a process, the one that torchrun's LOCAL_RANK names."""

    name: ClassVar[str] = "cuda"
    backend: ClassVar[Literal["gloo", "nccl"]] = "nccl"
    counts_phases: ClassVar[bool] = True

    def __init__(self) -> None:
        self._engine_fault: str | None = "not looked for yet"

    @property
    def device(self) -> torch.device:
        """This process's GPU."""
        return torch.device("cuda", torch.cuda.current_device())

    def install(self) -> None:
        """Take this process's GPU, and hide a Transformer Engine that cannot be imported.

        Raises:
            ConfigError: there is no device, or the CPU platform was installed in this process before.
        """
        if shim.is_installed():
            raise ConfigError("platform is cuda, but this process already runs as cpu; choose one for the whole run.")
        if not torch.cuda.is_available():
            raise ConfigError(
                "platform is cuda, but torch sees no CUDA device; use platform cpu or a CUDA build of torch."
            )
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        harmless.silence(harmless.EVERYWHERE)
        self._engine_fault = transformer_engine.fault()
        if self._engine_fault:  # said by `layer_spec` and `fp8_fault` to a run that wants it
            transformer_engine.silence_missing()
            engineless.install()

    def to_device(self, values: np.ndarray) -> torch.Tensor:
        """Through pinned memory, [...] of any dtype: a copy from any other has the host wait."""
        return torch.as_tensor(values).pin_memory().to(self.device, non_blocking=True)

    def synchronize(self) -> None:
        """Wait for the GPU."""
        torch.cuda.synchronize()

    def memory_bytes(self) -> dict[str, int]:
        """Bytes of torch's allocator on this GPU."""
        return {"allocated": torch.cuda.memory_allocated(), "peak": torch.cuda.max_memory_allocated()}

    def release_unused(self) -> None:
        """Give back the blocks that torch's allocator keeps: a server on the same GPU cannot have them otherwise."""
        gc.collect()
        torch.cuda.ipc_collect()  # what another process has read by its handle, and torch keeps until it is asked
        torch.cuda.empty_cache()

    def begin_phase(self) -> None:
        """Forget the peak so far."""
        torch.cuda.reset_peak_memory_stats()

    def fp8_fault(self, recipe: str, capability: tuple[int, int]) -> str | None:
        """What this GPU or its CUDA lacks."""
        if self._engine_fault:
            return self._engine_fault
        found = torch.cuda.get_device_capability()
        if found < capability:
            wanted, has = (".".join(map(str, version)) for version in (capability, found))
            return f"{torch.cuda.get_device_name()} has compute capability {has}, and it needs {wanted}"
        if recipe == "blockwise" and Version(torch.version.cuda or "0") < Version("12.9"):
            return f"torch was built for CUDA {torch.version.cuda}, and it needs 12.9"
        return None

    def transformer_defaults(self, transformer_impl: str | None = None) -> dict[str, Any]:
        """Transformer Engine with its fusions, unless the local layers are asked for."""
        from megatron_pz.platform.local_spec import LOCAL_DEFAULTS

        if transformer_impl == "local":
            transformer_engine.silence_missing()
            return {**LOCAL_DEFAULTS, "use_cpu_initialization": True}
        # Apex's kernel serves the output layer, which is Megatron's own even in Transformer Engine's specification.
        has_fused_gradient = importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
        return {
            "transformer_impl": "transformer_engine",
            "gradient_accumulation_fusion": has_fused_gradient,
            "bias_activation_fusion": True,
            "bias_dropout_fusion": True,
            "masked_softmax_fusion": True,
            "apply_rope_fusion": True,
            "persist_layer_norm": True,
            "moe_grouped_gemm": True,
            "moe_permute_fusion": True,
            "use_cpu_initialization": False,
        }

    def layer_spec(self, config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
        """Transformer Engine's layers, with the hook for a key-value cache, or the local ones.

        Raises:
            ConfigError: Transformer Engine is wanted and cannot be used, or not with this dtype; it is never replaced silently.
        """
        from megatron_pz.platform.local_spec import local_layer_spec

        if config.transformer_impl == "local":
            return local_layer_spec(config, vp_stage)
        if self._engine_fault:
            raise ConfigError(
                f"transformer.transformer_impl is {config.transformer_impl!r}, but {self._engine_fault}; install "
                'Transformer Engine with its torch extension, or set [transformer] transformer_impl = "local" (slower).'
            )
        if fault := transformer_engine.dtype_fault(config.params_dtype, config.context_parallel_size):
            raise ConfigError(
                f"model.params_dtype is float32, but {fault}; use --params-dtype bfloat16, or set [transformer] "
                'transformer_impl = "local" (slower).'
            )
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

        from megatron_pz.platform.cuda_layers import prepare

        return prepare(get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage))
