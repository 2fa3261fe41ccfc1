"""Transformer Engine's attention with the hook for a key-value cache. Imported only where Transformer Engine works."""

from __future__ import annotations

from typing import Any

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from megatron_pz.platform.cpu_layers import KeyValueCache


class CachedAttention(TEDotProductAttention):
    """Stock while `cache` is None; otherwise `cache.attend` answers, as in `cpu_layers.PackedAttention`."""

    def __init__(self, config: Any, layer_number: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, layer_number, *args, **kwargs)
        self.layer_index = layer_number - 1
        self.cache: KeyValueCache | None = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Attention output [T, heads * dim], or [s, b, heads * dim] from the cache, in the dtype of `query`."""
        if self.cache is not None:
            return self.cache.attend(self.layer_index, query, key, value)
        return super().forward(query, key, value, *args, **kwargs)


def prepare(block: TransformerBlockSubmodules) -> TransformerBlockSubmodules:
    """Megatron's specification of Transformer Engine's layers, with the cache hook, and one place in a checkpoint for a norm.

    Megatron's local layers write the norm before the experts under the name that it has inside a dense layer's linear, its
    Transformer Engine layers under its own; a checkpoint of the one would not load under the other.
    """
    for layer in block.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = CachedAttention
        if layer.submodules.pre_mlp_layernorm is not IdentityOp:
            layer.submodules.sharded_state_dict_keys_map = {
                **layer.submodules.sharded_state_dict_keys_map,
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            }
    return block
