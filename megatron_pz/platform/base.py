"""What every part asks of the machine, and nobody asks elsewhere: device, dtypes, collectives, layers, random state.

A platform is made by `select.select_platform`, which also installs it; after that megatron may be imported. The package
asks for CUDA nowhere outside this folder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch

from megatron_pz.errors import ConfigError

if TYPE_CHECKING:
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a name such as `bfloat16`.

    Raises:
        ConfigError: the name is none of `DTYPES`.
    """
    if name not in DTYPES:
        raise ConfigError(f"dtype is {name!r}; it must be one of {', '.join(DTYPES)}.")
    return DTYPES[name]


class Platform(ABC):
    """One kind of machine. `install()` runs before the first megatron import and may run again without effect."""

    name: ClassVar[str]
    backend: ClassVar[Literal["gloo", "nccl"]]
    counts_phases: ClassVar[bool] = False
    """Whether `begin_phase` has `memory_bytes` count its peak anew."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where this process keeps its weights and micro-batches."""

    @abstractmethod
    def install(self) -> None:
        """Make megatron importable and runnable here. Idempotent."""

    def to_device(self, values: np.ndarray) -> torch.Tensor:
        """A copy of the array, [...] of any dtype, on the device (on a CPU, perhaps itself), for which the host does not wait."""
        return torch.as_tensor(values).to(self.device)

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until everything that was launched is done."""

    @abstractmethod
    def memory_bytes(self) -> dict[str, int]:
        """Bytes held now (`allocated`) and at most so far (`peak`)."""

    @abstractmethod
    def transformer_defaults(self, transformer_impl: str | None = None) -> dict[str, Any]:
        """Fields of `TransformerConfig` that depend on the machine (fusions, initialisation, layer implementation).

        Args:
            transformer_impl: "local", "transformer_engine", or None for the platform's own choice.
        """

    @abstractmethod
    def layer_spec(self, config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
        """Modules of the decoder layers that this pipeline stage builds, and of its final norm.

        Raises:
            ConfigError: the layers asked for (`config.transformer_impl`) cannot be had on this machine.
        """

    def fp8_fault(self, recipe: str, capability: tuple[int, int]) -> str | None:
        """Why FP8 products cannot be had here, None if they can.

        Args:
            recipe: of `model.fp8`.
            capability: the least compute capability.
        """
        return f"the platform is {self.name}, and FP8 is for CUDA with Transformer Engine"

    @abstractmethod
    def release_unused(self) -> None:
        """Give memory that is held for later use back to the device, for other processes on it."""

    @abstractmethod
    def begin_phase(self) -> None:
        """Count the `peak` of `memory_bytes` anew, where the machine can."""

    def packed_seq_params(
        self,
        cu_seqlens: np.ndarray | torch.Tensor,
        positions: np.ndarray | None = None,
        gathered_places: np.ndarray | None = None,
    ) -> PackedSeqParams:
        """Megatron's description of S sequences that lie end to end.

        Args:
            cu_seqlens: int32 [S + 1], cumulative lengths, first 0, last T, of whole sequences.
            positions: int64, where in its sequence each token of this rank stands, where context-parallel ranks share
                them; with `gathered_places` of `batch.context`.
        """
        from megatron.core.packed_seq_params import PackedSeqParams

        from megatron_pz.platform.context_attention import SharedSequences

        longest = int(np.diff(np.asarray(cu_seqlens)).max())
        cumulative = self.to_device(np.asarray(cu_seqlens, dtype=np.int32))
        fields: dict[str, Any] = {
            "qkv_format": "thd",
            "cu_seqlens_q": cumulative,
            "cu_seqlens_kv": cumulative,
            "max_seqlen_q": longest,
            "max_seqlen_kv": longest,
        }
        if positions is None or gathered_places is None:
            return PackedSeqParams(**fields)
        return SharedSequences(
            **fields,
            positions=self.to_device(positions),
            gathered_places=self.to_device(gathered_places),
        )
