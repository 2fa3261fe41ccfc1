"""Transformer Engine's names and shapes in plain torch, so that Megatron's own Transformer Engine layers run on a CPU.

For tests only, in a process of its own (`tests/models/test_transformer_engine_layers.py`). What is tested is Megatron's
specification and our use of it: parameter names, places in a checkpoint, packed sequences, recipes. No kernel is.
"""

from transformer_engine import common, pytorch

__version__ = "2.11.0"
__all__ = ["common", "pytorch"]
