"""Attention of a few new queries over cached keys, in two parts that are merged afterwards.

A softmax over the union of two sets of keys is a weighted mean of the softmaxes over each, with weights from their
log-sum-exps; so keys that several rows share are read once for all of them.

Shapes: B batch, G key heads (query groups), Q queries that see the same keys, L keys, D head size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attend_part(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of `query` [B, G, Q, D] over `key`, `value` [B, G, L, D] with `bias` [B, 1, 1, L] (0 or -inf).

    Every query must see at least one key.

    Returns:
        Output [B, G, Q, D] and log-sum-exp of the scaled scores, float32 [B, G, Q].
    """
    if query.device.type == "cpu" and key.shape[2] > FUSED_FROM:
        # torch's public attention does not tell the log-sum-exp; this is the kernel that it calls on a CPU.
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output, sums = kernel(query, key, value, 0.0, False, attn_mask=bias.to(query.dtype))
        return output, sums
    return attend_part_plainly(query, key, value, bias)


FUSED_FROM = 16
"""Keys above which the fused kernel is the faster one (measured on one thread)."""


def attend_part_plainly(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """`attend_part` in plain torch, for any device: output [B, G, Q, D] in the dtype of `value`, and float32 [B, G, Q]."""
    batch, groups, queries, dim = query.shape
    length = key.shape[2]
    flat = (batch * groups, length, dim)
    scores = torch.bmm(query.reshape(-1, queries, dim), key.reshape(flat).transpose(1, 2))
    scores = scores.view(batch, groups, queries, length).float().mul_(1 / math.sqrt(dim)).add_(bias)
    sums = scores.logsumexp(-1)
    shares = scores.sub_(sums[..., None]).exp_().to(value.dtype)
    output = torch.bmm(shares.view(-1, queries, length), value.reshape(flat))
    return output.view(batch, groups, queries, dim), sums


def merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """Attention over the keys of both parts, [..., D], from each part's output [..., D] and log-sum-exp, float32 [...]."""
    weight = torch.sigmoid(second[1] - first[1])[..., None]
    return torch.lerp(first[0], second[0], weight.to(first[0].dtype))
