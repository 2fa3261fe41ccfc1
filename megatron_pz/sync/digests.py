"""Digests of the trainer's tensors, fused and padded as an SGLang server holds them, to compare with the server's own.

    q_proj, k_proj, v_proj             -> qkv_proj, one after the other
    gate_proj, up_proj                 -> gate_up_proj
    experts' gate, up; down            -> experts.w13_weight (of every expert gate, then up); experts.w2_weight
    embedding and head                 -> rows of zeros up to a multiple of 64

A server on a CPU answers /weights_checker with the first 8 bytes of each tensor's SHA-256 (SGLang 0.5.23; on a GPU it is
another digest, which is not computed here). Pieces are digested as they come: no tensor is fused in memory.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

ROW_MULTIPLE = 64
_PLACES: Mapping[str, tuple[str, int, int]] = {  # fused name, place in it, number of places
    "q_proj": ("qkv_proj", 0, 3),
    "k_proj": ("qkv_proj", 1, 3),
    "v_proj": ("qkv_proj", 2, 3),
    "gate_proj": ("gate_up_proj", 0, 2),
    "up_proj": ("gate_up_proj", 1, 2),
}
_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight$")
_EXPERT_PLACES: Mapping[str, tuple[str, int, int]] = {
    "gate": ("w13_weight", 0, 2),
    "up": ("w13_weight", 1, 2),
    "down": ("w2_weight", 0, 1),
}


def server_digests(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> dict[str, str]:
    """Digest by the server's name of a tensor.

    Args:
        tensors: whole ones [...] by Hugging Face name.
        dtype: of the server's weights.
    """
    hashes: dict[str, hashlib._Hash] = {}
    places: dict[str, int] = {}
    early: dict[tuple[str, int], Tensor] = {}  # pieces that came before those they follow
    for name, tensor in tensors:
        fused, place = fused_name(name)
        early[fused, place] = tensor
        while (piece := early.pop((fused, places.get(fused, 0)), None)) is not None:
            _add(hashes.setdefault(fused, hashlib.sha256()), _padded(fused, piece).to(dtype))
            places[fused] = places.get(fused, 0) + 1
    for fused, place in early:
        raise ValueError(f"piece {place} of {fused} came, and piece {places.get(fused, 0)} did not")
    return {name: f"{int.from_bytes(found.digest()[:8], 'big'):016x}" for name, found in hashes.items()}


def fused_name(name: str) -> tuple[str, int]:
    """The server's tensor that the Hugging Face tensor `name` is a part of, and its place in it.

    >>> fused_name("model.layers.3.self_attn.k_proj.weight")
    ('model.layers.3.self_attn.qkv_proj.weight', 1)
    >>> fused_name("model.layers.3.mlp.experts.5.up_proj.weight")
    ('model.layers.3.mlp.experts.w13_weight', 11)
    >>> fused_name("model.norm.weight")
    ('model.norm.weight', 0)
    """
    if match := _EXPERT.match(name):
        fused, place, places = _EXPERT_PLACES[match[3]]
        return f"{match[1]}.{fused}", int(match[2]) * places + place
    *front, last, kind = name.split(".")
    if last in _PLACES:
        fused, place, _ = _PLACES[last]
        return ".".join([*front, fused, kind]), place
    return name, 0


def _padded(name: str, tensor: Tensor) -> Tensor:
    if name not in ("model.embed_tokens.weight", "lm_head.weight") or tensor.shape[0] % ROW_MULTIPLE == 0:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(-tensor.shape[0] % ROW_MULTIPLE, tensor.shape[1])])


def _add(digest: hashlib._Hash, tensor: Tensor) -> None:
    digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
