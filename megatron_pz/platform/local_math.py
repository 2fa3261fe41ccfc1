"""What the local layers compute between their matrix products, each with its gradient written out.

Composed of single operations, autograd would keep and read several tensors of the layer's size for each of these; here
each keeps its input, and the backward recomputes the rest. Plain torch, on any device.

Shapes: T tokens, F width of the MLP, G key heads (query groups) of this rank, R query heads of a group, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
"""What is computed here. Norms of bfloat16 are taken in float32."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight of `x` [..., H] and `weight` [H], in the dtype of `x`."""
    if not torch.is_grad_enabled():
        return (x * _inverse_rms(x, eps) * weight).to(x.dtype)
    return _RMSNorm.apply(x, weight, eps)


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up of `x` [..., 2F], gate first: [..., F] of its dtype."""
    return _Swiglu.apply(x) if torch.is_grad_enabled() else _swiglu(x)


def split_heads(
    mixed: Tensor, weights: tuple[Tensor, Tensor] | None, eps: float, rotation: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of a fused projection; query and key normalised head by head, then rotated.

    Args:
        mixed: [T, G, R + 2, D], of each group its query heads, its key head, its value head.
        weights: of the norms of query and key, [D] each; None: there is no norm.
        eps: of the norms.
        rotation: cosines and sines [T, 1, 1, D], second half equal to the first; None: no rotary embedding.

    Returns:
        query [T, G * R, D], key [T, G, D], value [T, G, D], in the dtype of `mixed`.
    """
    query_weight, key_weight = weights or (None, None)
    cos, sin = rotation or (None, None)
    if not torch.is_grad_enabled():
        return _split_heads(mixed, query_weight, key_weight, eps, cos, sin)[0]
    return _SplitHeads.apply(mixed, query_weight, key_weight, eps, cos, sin)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps), [..., 1]."""
    wide = torch.float32 if x.dtype is torch.bfloat16 else x.dtype
    norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    return norms.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _norm_backward(x: Tensor, weight: Tensor, scale: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `x`, and of `weight` by row (to be summed), of y = x * scale * weight."""
    scaled = grad * scale
    by_row = scaled * x
    scaled = scaled * weight
    share = torch.linalg.vecdot(scaled, x.to(scaled.dtype))[..., None].mul_(scale.square()).div_(x.shape[-1])
    return scaled.sub_(x * share).to(x.dtype), by_row


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = _inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale * weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        grad_x, by_row = _norm_backward(x, weight, scale, grad)
        return grad_x, by_row.flatten(0, -2).sum(0).to(weight.dtype), None


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate).mul_(up)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _swiglu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, -1)
        grad_x = torch.empty_like(x)
        grad_gate, grad_up = grad_x.chunk(2, -1)
        torch.mul(F.silu(gate), grad, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grad_x


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` [..., D] turned by its angle: pairs are (x[i], x[i + D / 2])."""
    half = x.shape[-1] // 2
    other = torch.cat((-x[..., half:], x[..., :half]), -1)
    return (x * cos).add_(other * sin)


def _split_heads(
    mixed: Tensor, query_weight: Tensor | None, key_weight: Tensor | None, eps: float, cos: Tensor | None, sin: Any
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None, Tensor | None]:
    """Heads, and what the backward needs of the norms: weights [R + 1, D], and inverse root mean squares."""
    tokens, groups, heads, dim = mixed.shape
    both, weight, scale = mixed[:, :, :-1], None, None
    if query_weight is not None and key_weight is not None:
        weight = torch.cat((query_weight.expand(heads - 2, dim), key_weight[None]))
        scale = _inverse_rms(both, eps)
        both = (both * scale * weight).to(mixed.dtype)
    if cos is not None:
        both = _rotated(both, cos, sin)
    query = both[:, :, :-1].reshape(tokens, groups * (heads - 2), dim)
    return (query, both[:, :, -1].contiguous(), mixed[:, :, -1].contiguous()), weight, scale


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mixed: Tensor,
        query_weight: Tensor | None,
        key_weight: Tensor | None,
        eps: float,
        cos: Tensor | None,
        sin: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        outputs, weight, scale = _split_heads(mixed, query_weight, key_weight, eps, cos, sin)
        ctx.save_for_backward(mixed, weight, scale, cos, sin)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        mixed, weight, scale, cos, sin = ctx.saved_tensors
        query, key, value = grads
        tokens, groups, heads, dim = mixed.shape
        both = torch.cat((query.view(tokens, groups, heads - 2, dim), key[:, :, None]), 2)
        if cos is not None:
            both = _rotated(both, cos, -sin)
        grad_query_weight = grad_key_weight = None
        if weight is not None:
            both, by_row = _norm_backward(mixed[:, :, :-1], weight, scale, both)
            by_head = by_row.sum((0, 1)).to(weight.dtype)
            grad_query_weight, grad_key_weight = by_head[:-1].sum(0), by_head[-1]
        return torch.cat((both, value[:, :, None]), 2), grad_query_weight, grad_key_weight, None, None, None
