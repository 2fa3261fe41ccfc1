"""Transformer Engine's attention with the hook for a key-value cache. Imported only where Transformer Engine works."""

from __future__ import annotations

from typing import Any

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from torch import Tensor

from megatron_pz.platform.cpu_layers import KeyValueCache


class CachedAttention(TEDotProductAttention):
    """Stock while `cache` is None; otherwise `cache.attend` answers, as in `cpu_layers.PackedAttention`."""

    def __init__(self, config: Any, layer_number: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, layer_number, *args, **kwargs)
        self.layer_index = layer_number - 1
        self.cache: KeyValueCache | None = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Attention output [T, heads * dim], or [s, b, heads * dim] from the cache."""
        if self.cache is not None:
            return self.cache.attend(self.layer_index, query, key, value)
        return super().forward(query, key, value, *args, **kwargs)
