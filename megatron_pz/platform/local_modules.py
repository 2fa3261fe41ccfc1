"""Megatron's layer, attention and MLP with the arithmetic between their matrix products taken from `local_math`.

Where a setting asks for something else (output gates, interleaved rotary pairs, other activations)
they are Megatron's own.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_pz.platform import local_math
from megatron_pz.platform.context_attention import SharedSequences
from megatron_pz.platform.cpu_layers import RMSNorm


class LocalSelfAttention(SelfAttention):
    """Splits, normalises and rotates the heads at once."""

    _rotation: tuple[Tensor, Tensor] | None = None

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        rotary_pos_emb: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> Any:
        """As Megatron's, of hidden states [s, b, H] of `params_dtype`. The rotary embedding is not handed on: it is done with
        when query and key are there."""
        self._is_fused = self._can_fuse(hidden_states, rotary_pos_emb)
        if self._is_fused:
            if self._is_rotated(rotary_pos_emb):
                self._rotation = _rotation(rotary_pos_emb, packed_seq_params, hidden_states.dtype)
            rotary_pos_emb = None
        try:
            return super().forward(
                hidden_states, *args, rotary_pos_emb=rotary_pos_emb, packed_seq_params=packed_seq_params, **kwargs
            )
        finally:
            self._rotation = None

    def get_query_key_value_tensors(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Query, key and value [s, b, heads, D] in the dtype of `hidden_states` [s, b, H], ready for attention."""
        if not self._is_fused:
            return super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        return self._heads(self.linear_qkv(hidden_states)[0], self._rotation)

    def _heads(self, mixed: Tensor, rotation: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        groups, dim = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        norms = None
        if self.q_layernorm is not None:
            norms = (self.q_layernorm.weight, self.k_layernorm.weight)
        heads = local_math.split_heads(
            mixed.view(mixed.shape[0], groups, -1, dim), norms, self.config.layernorm_epsilon, rotation
        )
        query, key, value = (head[:, None] for head in heads)
        return query, key, value

    def attend_cached(self, hidden: Tensor, angles: Tensor | None) -> Tensor:
        """Output [s, 1, heads * D] of the core attention, in the dtype of `hidden` [s, 1, H], through its cache."""
        rotation = _rotation(angles, None, hidden.dtype) if self._is_rotated(angles) else None
        query, key, value = self._heads(F.linear(hidden, self.linear_qkv.weight), rotation)
        return self.core_attention.cache.attend(self.layer_number - 1, query, key, value)

    def _is_rotated(self, angles: Any) -> TypeGuard[Tensor]:
        without = self.config.no_rope_freq
        return angles is not None and not (without and without[self.layer_number - 1])

    def _can_fuse(self, hidden: Tensor, rotary: Any) -> bool:
        config, norms = self.config, (self.q_layernorm, self.k_layernorm)
        return (
            hidden.dtype in local_math.DTYPES
            and hidden.shape[1] == 1
            and (rotary is None or (isinstance(rotary, Tensor) and rotary.shape[-1] == config.kv_channels))
            and not (config.attention_output_gate or config.rotary_interleaved or config.test_mode)
            and config.num_query_groups >= self.world_size
            and (norms == (None, None) or all(isinstance(norm, RMSNorm) for norm in norms))
        )


def _rotation(angles: Tensor, packed: PackedSeqParams | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, 1, 1, D] of each token, from the angles of each position, or already of each token."""
    angles = angles.to(torch.float32) if dtype is torch.float32 else angles
    tables = angles.cos().to(dtype), angles.sin().to(dtype)
    if packed is None:
        return tables
    if isinstance(packed, SharedSequences):
        cos, sin = (table.index_select(0, packed.positions) for table in tables)
        return cos, sin
    starts = packed.cu_seqlens_q.long()
    lengths = starts.diff()
    positions = torch.arange(int(starts[-1]), device=starts.device) - starts[:-1].repeat_interleave(lengths)
    cos, sin = (table.index_select(0, positions) for table in tables)
    return cos, sin


class LocalMLP(MLP):
    """A gated MLP whose activation is one step."""

    def forward(self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any) -> Any:
        """As Megatron's: [s, b, H] in the dtype of `hidden_states`, and a bias."""
        if per_token_scale is not None or not self.is_plain(hidden_states):
            return super().forward(hidden_states, per_token_scale, **kwargs)
        intermediate, bias = self.linear_fc1(hidden_states)
        if bias is not None:
            intermediate = intermediate + bias
        return self.linear_fc2(local_math.swiglu(intermediate))

    def is_plain(self, hidden: Tensor) -> bool:
        """Whether the activation is SwiGLU and nothing else, and `hidden` [...] of a dtype that `local_math` computes in."""
        config = self.config
        return (
            config.gated_linear_unit
            and config.activation_func is F.silu
            and config.activation_func_clamp_value is None
            and not config.glu_linear_offset
            and not (config.use_te_activation_func or config.bias_activation_fusion)
            and hidden.dtype in local_math.DTYPES
        )


class LocalTransformerLayer(TransformerLayer):
    """Sampling a token at a time is bound by the calls between small products: with a key-value cache and without
    gradients a dense layer on one rank is its eight steps and nothing between them. Training takes Megatron's way."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if type(self.mlp) is MLP:  # else experts
            # Not by the specification: Megatron hands its groups on to classes that it knows only.
            self.mlp.__class__ = LocalMLP

    def forward(self, hidden_states: Tensor, *args: Any, rotary_pos_emb: Any = None, **kwargs: Any) -> Any:
        """As Megatron's: (hidden states [s, b, H] in the dtype of those given, context)."""
        if torch.is_grad_enabled() or not self._is_bare(hidden_states, rotary_pos_emb):
            return super().forward(hidden_states, *args, rotary_pos_emb=rotary_pos_emb, **kwargs)
        attention, mlp = self.self_attention, self.mlp
        heads = attention.attend_cached(_normed(self.input_layernorm, hidden_states), rotary_pos_emb)
        hidden = hidden_states + F.linear(heads, attention.linear_proj.weight)
        inner = F.linear(_normed(self.pre_mlp_layernorm, hidden), mlp.linear_fc1.weight)
        return hidden + F.linear(local_math.swiglu(inner), mlp.linear_fc2.weight), kwargs.get("context")

    def _is_bare(self, hidden: Tensor, rotary: Any) -> bool:
        attention, mlp = self.self_attention, self.mlp
        return (
            isinstance(attention, LocalSelfAttention)
            and isinstance(mlp, LocalMLP)
            and attention.world_size == 1
            and getattr(attention.core_attention, "cache", None) is not None
            and not (self.config.add_bias_linear or self.config.add_qkv_bias or self.training)
            and isinstance(self.input_layernorm, RMSNorm)
            and isinstance(self.pre_mlp_layernorm, RMSNorm)
            and mlp.is_plain(hidden)
            and attention._can_fuse(hidden, rotary)
        )


def _normed(norm: RMSNorm, hidden: Tensor) -> Tensor:
    return local_math.rms_norm(hidden, norm.weight, norm.eps)
