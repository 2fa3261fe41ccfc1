"""What the real Transformer Engine compiles for attention over packed sequences, in plain torch: see fake_engine_kernels.py.

The fused attention of cuDNN, of whole sequences and of the pieces of them that context parallelism sends around, and how its forward
puts pieces together. Lengths are cumulative int32 [S + 1]; logarithms of softmax sums are [T, heads, 1], as since cuDNN 9.6.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
import transformer_engine_torch as extension
from torch import Tensor
from transformer_engine.pytorch.cpp_extensions.fused_attn import FusedAttnBackend

MASKS = extension.NVTE_Mask_Type


def parts(t: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, ...]:
    """Of [T, ...], each sequence."""
    assert cu_seqlens.dtype is torch.int32, cu_seqlens.dtype
    return t.split([end - start for start, end in pairwise(cu_seqlens.tolist())])


def get_cudnn_version():
    return 91900


def get_fused_attn_backend(
    is_training, q_type, kv_type, layout, bias, mask, softmax, dropout, heads, groups, max_q, max_kv, dim, *_
):
    assert isinstance(max_q, int) and heads % groups == 0
    return FusedAttnBackend["F16_arbitrary_seqlen" if dim % 8 == 0 else "No_Backend"]


def _scores(q: Tensor, k: Tensor, mask, scale: float) -> Tensor:
    """[heads, Tq, Tk] of one sequence."""
    found = scale * torch.einsum("qhd,khd->hqk", q.float(), k.float().repeat_interleave(q.shape[1] // k.shape[1], 1))
    if mask == MASKS.NVTE_PADDING_MASK:
        return found
    assert mask == MASKS.NVTE_PADDING_CAUSAL_MASK and len(q) == len(k), (mask, q.shape, k.shape)
    return found.masked_fill(torch.ones(len(q), len(k), dtype=torch.bool).triu(1), -torch.inf)


def fused_attn_fwd(
    max_q, max_kv, is_training, scale, dropout, fill, layout, bias, mask, softmax, window, cu_q, cu_kv, q, k, v, *_
):
    assert window in ((-1, 0), (-1, -1)), window
    out, sums = [], []
    for one_q, one_k, one_v in zip(parts(q, cu_q), parts(k, cu_kv), parts(v, cu_kv), strict=True):
        scores = _scores(one_q, one_k, mask, scale)
        sums.append(scores.logsumexp(-1).T)
        wide = one_v.float().repeat_interleave(q.shape[1] // v.shape[1], 1)
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), wide))
    return [torch.cat(out).to(q.dtype), torch.cat(sums)[..., None], torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(
    max_q, max_kv, scale, dropout, fill, layout, bias, mask, softmax, window, deterministic, cu_q, cu_kv, q, k, v, out, d_out,
    fake_dtype, dqkv_dtype, kept, *_,
):  # fmt: skip
    groups, found = q.shape[1] // k.shape[1], ([], [], [])
    by_query = zip(*(parts(x, cu_q) for x in (q, out, d_out, kept[0][..., 0])), strict=True)
    by_key = zip(parts(k, cu_kv), parts(v, cu_kv), strict=True)
    for (one_q, one_out, d_one, sums), (one_k, one_v) in zip(by_query, by_key, strict=True):
        weights = (_scores(one_q, one_k, mask, scale) - sums.T[..., None]).exp()
        d_one, wide_k, wide_v = d_one.float(), *(x.float().repeat_interleave(groups, 1) for x in (one_k, one_v))
        d_weights = torch.einsum("qhd,khd->hqk", d_one, wide_v)
        d_scores = scale * weights * (d_weights - (d_one * one_out.float()).sum(-1).T[..., None])
        found[0].append(torch.einsum("hqk,khd->qhd", d_scores, wide_k))
        for into, wide in ((found[1], torch.einsum("hqk,qhd->khd", d_scores, one_q.float())),
                           (found[2], torch.einsum("hqk,qhd->khd", weights, d_one))):  # fmt: skip
            into.append(wide.unflatten(1, (k.shape[1], groups)).sum(2))
    return [torch.cat(pieces).to(q.dtype) for pieces in found] + [None, None]


def convert_thd_to_bshd(t, cu_seqlens, batch, longest):
    return torch.stack([F.pad(part, (0, 0, 0, 0, 0, longest - len(part))) for part in parts(t, cu_seqlens)])


def convert_bshd_to_thd(t, cu_seqlens, total):
    sizes = cu_seqlens.diff().tolist()
    assert sum(sizes) == total
    return torch.cat([row[:size] for row, size in zip(t, sizes, strict=True)])


def _halves(cu_seqlens: Tensor, which: int) -> Tensor:
    """Places of the first (0) or second (1) half of each sequence."""
    bounds = [(start, end, (start + end) // 2) for start, end in pairwise(cu_seqlens.tolist())]
    spans = [(start, middle) if which == 0 else (middle, end) for start, end, middle in bounds]
    return torch.cat([torch.arange(start, end) for start, end in spans])


def thd_read_half_tensor(t, cu_seqlens, which):
    return t[_halves(cu_seqlens, which)]


def thd_second_half_lse_correction(sums, of_step, cu_seqlens, is_packed):
    assert is_packed
    second = _halves(cu_seqlens, 1)
    sums[:, second] = torch.logaddexp(sums[:, second], of_step)


def thd_out_correction(out, of_step, sums, sums_of_step, cu_seqlens, only_second_half, is_packed):
    places = _halves(cu_seqlens, 1) if only_second_half else torch.arange(len(out))
    share = (sums_of_step - sums[:, places]).exp().T[..., None]
    out[places] += (of_step.reshape(len(places), *out.shape[1:]).float() * share).to(out.dtype)


NAMES = (
    "get_cudnn_version", "get_fused_attn_backend", "fused_attn_fwd", "fused_attn_bwd", "convert_thd_to_bshd", "convert_bshd_to_thd",
    "thd_read_half_tensor", "thd_second_half_lse_correction", "thd_out_correction",
)  # fmt: skip
