"""Layers that Megatron-Core's local specification lacks: a norm for sequence parallelism, packed attention, a cache hook.

They are plain torch and run on any device; `cpu.CpuPlatform` puts them into every layer.
"""

from __future__ import annotations

from itertools import groupby, pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_pz.platform import local_math
from megatron_pz.platform.context_attention import attend_shared


class KeyValueCache(Protocol):
    """Keys and values of earlier tokens; what generation hangs into every core attention (`PolicyModel.decoding`)."""

    def attend(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store the new keys and values, and return the attention output of the new tokens.

        Args:
            layer_index: of the layer in the whole model, from 0.
            query: [s, b, query heads of this rank, dim], rotary embedding applied.
            key: [s, b, key heads of this rank, dim], rotary embedding applied.
            value: [s, b, key heads of this rank, dim].

        Returns:
            [s, b, query heads * dim], in the dtype of `value`.
        """
        ...


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm whose weight tells `finalize_model_grads` that its gradient is partial under sequence
    parallelism; Megatron's `WrappedTorchNorm` refuses that layout."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., hidden_size], same shape and dtype out."""
        if x.dtype in local_math.DTYPES and not x.is_cuda:  # CUDA has a kernel of its own
            return local_math.rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class PackedAttention(torch.nn.Module):
    """Causal attention by torch's SDPA, sequence by sequence of a packed row; grouped queries; no dropout.

    `cache` None: training and scoring. Otherwise every forward hands its query, key and value to `cache.attend`
    (see `KeyValueCache`) and returns what comes back.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *args: Any,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **kw: Any,
    ) -> None:
        super().__init__()
        self._context_group = pg_collection.cp if config.context_parallel_size > 1 else None
        self.layer_index = layer_number - 1
        self.softmax_scale = softmax_scale
        self.cache: KeyValueCache | None = None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attention output of this rank's heads.

        Args:
            query: packed [T, heads, dim], T tokens of this rank, else [s, b, heads, dim]; key and value likewise with
                their own heads.
            attention_mask: unused, attention is causal inside each sequence.
            packed_seq_params: cumulative lengths of the sequences, or None for one sequence a row.

        Returns:
            [T, heads * dim], else [s, b, heads * dim], in the dtype of `query`.
        """
        if self.cache is not None:
            return self.cache.attend(self.layer_index, query, key, value)
        if packed_seq_params is None:
            assert self._context_group is None, "under context parallelism rows are packed"
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            return self._sdpa(q, k, v).permute(2, 0, 1, 3).flatten(2)
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        # Neighbours of one length are a batch; packing puts them side by side.
        runs = [(len(list(run)), length) for length, run in groupby(b - a for a, b in pairwise(bounds))]
        if self._context_group is not None:
            return attend_shared(query, key, value, packed_seq_params, runs, self._sdpa, self._context_group)
        sizes = [count * length for count, length in runs]
        outputs = []
        for run, *piece in zip(runs, query.split(sizes), key.split(sizes), value.split(sizes), strict=True):
            q, k, v = (x.unflatten(0, run).transpose(1, 2) for x in piece)
            outputs.append(self._sdpa(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1))
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """[b, heads, s, dim] of each; without a mask causal."""
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=self.softmax_scale, enable_gqa=True
        )
