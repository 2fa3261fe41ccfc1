"""Parameters of a model's parts for a tensor-parallel size, from which the stages of any layout add up.

One small build serves all layouts of that size, which is what a search among hundreds of them needs. It is the trainer's
model again, with one expert a rank; padding of buffers is counted by the rule of the distributed optimizer's buckets, not built.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_pz.config.schema import Config
from megatron_pz.models.family import HfConfig
from megatron_pz.models.policy import build_policy
from megatron_pz.models.registry import family as family_of
from megatron_pz.models.transformer import expert_tensor_size
from megatron_pz.plan.stages import Buffer, Stage, fake_world, layers_of, shapes_only
from megatron_pz.platform.base import torch_dtype
from megatron_pz.platform.meta import MetaPlatform, on_meta

BUCKET = 128
"""Buckets of the distributed optimizer end at a multiple of this and of the ranks that share them."""


@dataclass(frozen=True)
class Parts:
    """Parameters on one rank, those of experts apart."""

    embedding: int
    layers: tuple[int, ...]  # of each layer, without experts
    expert: int  # of one whole expert
    num_experts: int
    expert_layers: tuple[bool, ...]
    final_norm: int
    is_tied: bool

    @property
    def total(self) -> int:
        """Of the whole model, where the tensor-parallel size is 1."""
        head = 0 if self.is_tied else self.embedding
        return self.embedding + sum(self.layers) + self.experts + self.final_norm + head

    @property
    def experts(self) -> int:
        """Of all experts of all layers."""
        return self.expert * self.num_experts * sum(self.expert_layers)

    def active_experts(self, config: TransformerConfig) -> float:
        """Parameters of the experts that a token is sent to, of a whole model."""
        return self.experts * config.moe_router_topk / self.num_experts if self.num_experts else 0.0

    def active(self, config: TransformerConfig) -> float:
        """Parameters that a token is multiplied with, of a whole model: a row of the embedding is only read."""
        unused = 0 if self.is_tied else self.embedding
        return self.total - unused - self.experts + self.active_experts(config)


def model_parts(hf_config: HfConfig, config: Config, tensor: int) -> Parts:
    """The parts for tensor-parallel size `tensor`.

    Raises:
        LayoutError: `tensor` does not divide the model.
        ConfigError, ModelError: as `models.policy.build_policy`.
    """
    family = family_of(hf_config)
    num_experts = int(family.transformer_fields(hf_config).get("num_moe_experts") or 0)
    shapes = shapes_only(config)
    sizes = dataclasses.replace(
        type(config.parallel)(),
        tensor_model_parallel_size=tensor,
        expert_model_parallel_size=max(1, num_experts),
        sequence_parallel=tensor > 1,
    )
    shapes = dataclasses.replace(shapes, parallel=sizes)
    with fake_world(shapes, math.lcm(tensor, max(1, num_experts)), 0), on_meta():
        model = build_policy(hf_config, shapes, MetaPlatform())
    is_expert = {id(parameter) for parameter in model.parameters() if not getattr(parameter, "allreduce", True)}

    def count(module: object, experts: bool = False) -> int:
        found = module.parameters()  # type: ignore[attr-defined]
        return sum(parameter.numel() for parameter in found if (id(parameter) in is_expert) is experts)

    flags = tuple(family.is_moe_layer(hf_config))
    per_expert = max((count(layer, experts=True) for layer in model.decoder.layers), default=0)
    return Parts(
        embedding=count(model.embedding),
        layers=tuple(count(layer) for layer in model.decoder.layers),
        expert=per_expert,
        num_experts=num_experts,
        expert_layers=flags,
        final_norm=count(model.decoder.final_layernorm),
        is_tied=family.model_fields(hf_config).tie_word_embeddings,
    )


def stages_of(parts: Parts, config: Config, world_size: int) -> list[Stage]:
    """The stages of `config`'s layout, added up. `parts` are for its tensor-parallel size."""
    sizes = config.parallel
    stages = sizes.pipeline_model_parallel_size
    in_stage, width = world_size // stages, expert_tensor_size(sizes)
    experts_here = parts.num_experts // sizes.expert_model_parallel_size
    element = torch_dtype(config.model.params_dtype).itemsize
    gradient = 4 if config.ddp.get("grad_reduce_in_fp32", True) else element
    found = []
    for index in range(stages):
        layers, is_first, is_last = layers_of(config, len(parts.layers), index), index == 0, index == stages - 1
        dense = sum(parts.layers[layer] for layer in layers) + is_first * parts.embedding
        if is_last:
            dense += parts.final_norm + (0 if parts.is_tied and is_first else parts.embedding)
        experts = sum(parts.expert_layers[layer] for layer in layers) * experts_here * parts.expert // width
        counts = [(False, dense, in_stage // sizes.tensor_model_parallel_size)]
        if experts:
            counts.append((True, experts, in_stage // (width * sizes.expert_model_parallel_size)))
        buffers = tuple(
            _buffer(is_expert, count, ranks, element, gradient, sizes.use_distributed_optimizer)
            for is_expert, count, ranks in counts
        )
        found.append(Stage(index, layers, is_last, buffers))
    return found


def _buffer(is_expert: bool, count: int, ranks: int, element: int, gradient: int, is_sharded: bool) -> Buffer:
    multiple = math.lcm(ranks, BUCKET)
    padded = -(-count // multiple) * multiple if is_sharded else count
    return Buffer(is_expert, count, padded, padded // ranks if is_sharded else count, ranks, element, gradient)
