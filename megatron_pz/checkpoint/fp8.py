"""Weights in FP8 by blocks of 128 x 128, as the Qwen3-FP8 folders have them and SGLang and `transformers` read them.

A weight becomes float8_e4m3fn, and `NAME_scale_inv` holds for each block the float32 number that it is multiplied by.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from megatron_pz.config.fp8 import BLOCK

LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448
SUFFIX = "_scale_inv"
KEPT = ("embed_tokens", "lm_head", "norm", "mlp.gate.")
"""In names of weights that stay as they are: embedding, head, norms, routers."""


def encoded(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """What stands for `tensor` in an FP8 folder: blocks and scales of a matrix [rows, columns], as `quantized`; bfloat16 of
    others, and of those that are kept."""
    if tensor.dim() != 2 or any(part in name for part in KEPT):
        return [(name, tensor.to(torch.bfloat16))]
    blocks, scales = quantized(tensor)
    return [(name, blocks), (name + SUFFIX, scales)]


def all_encoded(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """`encoded` of each, [...] of any floating dtype, in order: what a server with FP8 weights is handed in place of `tensors`."""
    for name, tensor in tensors:
        yield from encoded(name, tensor)


def quantized(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn [rows, columns] and float32 [blocks of rows, blocks of columns], the largest of each block at 448."""
    rows, columns = tensor.shape
    padded = torch.nn.functional.pad(tensor.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    tiles = padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    scales = (tiles.abs().amax((1, 3)) / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    scaled = (tiles / scales[:, None, :, None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return scaled.view(padded.shape)[:rows, :columns].contiguous(), scales
