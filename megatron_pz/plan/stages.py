"""The trainer's own model of every rank that differs from the others, built without memory and without the other ranks.

torch's `fake` backend answers for a world of any size, the meta device holds shapes and no numbers. What is built is what
`train.model.build_model` builds, Megatron's data-parallel buffers included, from the local layers: Transformer Engine's
have the same weights. Ranks that differ in their tensor, expert, context or data-parallel place only hold tensors of the same
shapes, so one rank a pipeline stage is built; stages with the same layers are built once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_pz.config.schema import Config
from megatron_pz.models.family import HfConfig
from megatron_pz.models.registry import family as family_of
from megatron_pz.models.shards import unwrap
from megatron_pz.platform.meta import MetaPlatform, on_meta
from megatron_pz.train.model import build_model
from megatron_pz.train.parallel import Parallel, shutdown, start_groups, this_rank


@dataclass(frozen=True)
class Buffer:
    """Parameters of one rank whose gradients are summed over the same ranks: the dense ones, or its experts'. Counts are of
    elements."""

    is_expert: bool
    num_parameters: int
    num_elements: int  # of the buffer that holds them: with the distributed optimizer it is padded
    shard_parameters: int  # whose optimizer state a rank keeps; of the ranks that share it, the one with most
    num_ranks: int  # that hold a copy, and sum its gradients
    parameter_bytes: int  # of an element
    gradient_bytes: int  # of an element


@dataclass(frozen=True)
class Stage:
    """What a rank of one pipeline stage holds."""

    index: int
    layers: tuple[int, ...]  # numbers in the whole model, from 0
    has_head: bool
    buffers: tuple[Buffer, ...]

    @property
    def num_parameters(self) -> int:
        return sum(buffer.num_parameters for buffer in self.buffers)


@contextmanager
def fake_world(config: Config, world_size: int, rank: int) -> Iterator[Parallel]:
    """This process as one rank of a world whose others do not exist. Megatron's groups are those of `config`.

    Raises:
        LayoutError: the number of ranks is no multiple of what a model needs.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        start_groups(config.parallel, with_gloo=False)
        world = dist.group.WORLD
        assert world is not None
        yield this_rank(config.parallel, MetaPlatform(), (), world)
    finally:
        shutdown()


def build_stages(hf_config: HfConfig, config: Config, world_size: int) -> list[Stage]:
    """Every pipeline stage of the layout; the CPU platform must be installed.

    Raises:
        LayoutError: the layout does not divide the ranks or the model.
        ConfigError, ModelError: as `train.model.build_model`.
    """
    shapes, found = shapes_only(config), []
    built: dict[Any, Stage] = {}
    is_moe = family_of(hf_config).is_moe_layer(hf_config)
    num_stages = config.parallel.pipeline_model_parallel_size
    for index in range(num_stages):
        kind: Any = (index == 0, index == num_stages - 1, _layer_kinds(is_moe, config, index))
        if kind not in built:
            # The ranks of a stage lie side by side, one stage after the other.
            with fake_world(shapes, world_size, index * world_size // num_stages) as parallel, on_meta():
                built[kind] = _measured(build_model(hf_config, shapes, MetaPlatform(), parallel), index)
        found.append(dataclasses.replace(built[kind], index=index, layers=layers_of(config, len(is_moe), index)))
    return found


def shapes_only(config: Config) -> Config:
    """`config` without what changes how a model computes and not what it holds, so that it can be built on any machine."""
    how = ("transformer_impl", "recompute_", "fp8", "fp4", "moe_grouped_gemm", "cuda_graph", "enable_cuda_graph")
    table = {
        name: value for name, value in config.transformer.items() if not name.startswith(how) and "fusion" not in name
    }
    # Weights would be loaded: none are drawn. The planner counts them, their gradients and masters as in bfloat16.
    model = dataclasses.replace(config.model, init="pretrained", fp8="off", fp8_param_gather=False)
    return dataclasses.replace(config, model=model, transformer=table)


def layers_of(config: Config, num_layers: int, stage: int) -> tuple[int, ...]:
    """Layers of a pipeline stage; with interleaving its pieces lie apart."""
    stages, pieces = config.parallel.pipeline_model_parallel_size, config.parallel.virtual_pipeline_model_parallel_size
    size = num_layers // (stages * pieces)
    return tuple(
        layer
        for piece in range(pieces)
        for layer in range((piece * stages + stage) * size, (piece * stages + stage + 1) * size)
    )


def _layer_kinds(is_moe: list[bool], config: Config, stage: int) -> tuple[bool, ...]:
    return tuple(is_moe[layer] for layer in layers_of(config, len(is_moe), stage))


def _measured(chunks: list[DistributedDataParallel], index: int) -> Stage:
    models = [unwrap(chunk) for chunk in chunks]
    return Stage(
        index=index,
        layers=tuple(layer.layer_number - 1 for model in models for layer in model.decoder.layers),
        has_head=any(model.post_process for model in models),
        buffers=tuple(
            _buffer(buffer, is_expert)
            for chunk in chunks
            for is_expert, group in ((False, chunk.buffers), (True, chunk.expert_parallel_buffers))
            for buffer in group
        ),
    )


def _buffer(buffer: Any, is_expert: bool) -> Buffer:
    num_parameters = sum(parameter.numel() for parameter in buffer.params)
    is_sharded = buffer.ddp_config.use_distributed_optimizer
    return Buffer(
        is_expert=is_expert,
        num_parameters=num_parameters,
        num_elements=buffer.numel,
        shard_parameters=_largest_shard(buffer) if is_sharded else num_parameters,
        num_ranks=buffer.data_parallel_world_size,
        parameter_bytes=buffer.param_dtype.itemsize,
        gradient_bytes=buffer.grad_dtype.itemsize,
    )


def _largest_shard(buffer: Any) -> int:
    """Parameters of the rank that has most: each bucket is cut into equal shards, some of which hold more padding."""
    counts = [0] * buffer.data_parallel_world_size
    for low, high, bucket in buffer.param_index_map.values():
        begin, end = buffer.bucket_indices[bucket]
        size = (end - begin) // len(counts)
        for shard in range((low - begin) // size, (high - 1 - begin) // size + 1):
            counts[shard] += min(high, begin + (shard + 1) * size) - max(low, begin + shard * size)
    return max(counts)
