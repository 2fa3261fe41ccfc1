"""Rotary positions, halves rotated against each other."""

from itertools import pairwise

import torch

from transformer_engine.common import CALLED


def apply_rotary_pos_emb(t, freqs, tensor_format, interleaved=False, fused=True, cu_seqlens=None, cp_size=1, cp_rank=0):
    CALLED.add("apply_rotary_pos_emb")
    assert fused and not interleaved and cp_size == 1 and freqs.dtype is torch.float32
    if tensor_format == "sbhd":
        return _rotated(t, freqs[: len(t)])
    assert tensor_format == "thd" and cu_seqlens.dtype is torch.int32
    parts = t.split([end - start for start, end in pairwise(cu_seqlens.tolist())])
    return torch.cat([_rotated(part, freqs[: len(part), 0]) for part in parts])


def _rotated(t, freqs):
    one, two = t.float().chunk(2, -1)
    return (t.float() * freqs.cos() + torch.cat([-two, one], -1) * freqs.sin()).to(t.dtype)
