"""Random weights that do not depend on the layout: each tensor's numbers are a function of the seed and its HF name."""

from __future__ import annotations

import hashlib
import math
from functools import partial

import torch
from torch import Tensor

from megatron_pz.models.policy_model import PolicyModel
from megatron_pz.models.shards import shards_of


def random_tensor(name: str, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    """float32 [*shape]: normal numbers for a matrix, ones for a norm; the same for the same name, shape and seed everywhere."""
    if len(shape) == 1:
        return torch.ones(shape)
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def _read(shapes: dict[str, tuple[int, ...]], std: float, seed: int, name: str) -> Tensor:
    return random_tensor(name, shapes[name], std, seed)


def initialize(model: PolicyModel, seed: int) -> None:
    """Fill a stage: standard deviation `initializer_range` of config.json, and for the matrices that write into the
    residual stream that over sqrt(2 * layers), as Megatron does."""
    std = model.config.init_method_std
    residual_std = std / math.sqrt(2.0 * model.config.num_layers)
    for shard in shards_of([model]):
        shapes = dict(zip(shard.hf_names, shard.hf_shapes(), strict=True))
        spread = residual_std if shard.hf_names[0].endswith(("o_proj.weight", "down_proj.weight")) else std
        shard.fill(partial(_read, shapes, spread, seed))
