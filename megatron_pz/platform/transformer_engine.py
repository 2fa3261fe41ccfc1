"""Whether Transformer Engine can be used, found out before Megatron-Core tries.

Megatron-Core guards its imports of Transformer Engine with `except ImportError`; a half-installed one (no torch
extension, no NCCL on the library path) raises FileNotFoundError or OSError instead and takes `import megatron.core` down.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from importlib.metadata import version

import torch
from packaging.version import Version

FLOAT32_PACKED = Version("2.11")
"""From here on `UnfusedDotProductAttention` takes packed sequences; no other of its attentions takes float32."""


def hide() -> None:
    """Make every later `import transformer_engine` fail as if it were not installed."""
    if "transformer_engine" not in sys.modules:
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]


def fault() -> str | None:
    """Why Transformer Engine cannot be used here; None if it can. One that cannot be imported is hidden."""
    if sys.modules.get("transformer_engine", ...) is None:
        return "transformer_engine is hidden in this process"
    if importlib.util.find_spec("transformer_engine") is None:
        return "transformer_engine is not installed"
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError, RuntimeError) as error:
        for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
            del sys.modules[name]
        hide()
        return f"importing transformer_engine.pytorch failed: {type(error).__name__}: {error}"
    return None


def dtype_fault(params_dtype: torch.dtype, context_parallel_size: int = 1) -> str | None:
    """Why the Transformer Engine that is installed cannot attend packed sequences of this dtype; None if it can."""
    if params_dtype is not torch.float32:
        return None
    if context_parallel_size > 1:
        return "Transformer Engine's attention takes no float32 under context parallelism"
    if Version(version("transformer_engine")) < FLOAT32_PACKED:
        return f"transformer_engine {version('transformer_engine')} takes packed sequences of float32 from {FLOAT32_PACKED} on"
    return None


def silence_missing() -> None:
    """Drop Megatron-Core's import warnings that Transformer Engine or Apex is missing: the local layers need neither."""
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*not installed.*")
