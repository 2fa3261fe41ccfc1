"""Whether a layout can run, what it takes, and which others near it can."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_pz.config.rules import validate
from megatron_pz.config.schema import Config
from megatron_pz.errors import ConfigError, LayoutError
from megatron_pz.models.family import HfConfig
from megatron_pz.models.registry import family as family_of
from megatron_pz.models.transformer import padded_vocab_size, transformer_config
from megatron_pz.plan.activations import layer_bytes
from megatron_pz.plan.assumptions import GIB, Assumptions
from megatron_pz.plan.memory import Memory, Server, longest_sample, server_memory, stage_memory
from megatron_pz.plan.parts import Parts, model_parts, stages_of
from megatron_pz.plan.saves import Saves, saves
from megatron_pz.plan.stages import Stage, shapes_only
from megatron_pz.plan.step_time import StepTime, host_gib, num_micro_batches, step_time, work
from megatron_pz.plan.traffic import Link, links, weights_link
from megatron_pz.platform.meta import MetaPlatform
from megatron_pz.train.model import ddp_config
from megatron_pz.train.optimizer import optimizer_config

RECOMPUTE = ("recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules")
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
NUM_PROPOSED = 5


@dataclass(frozen=True)
class Machines:
    """Where a run is to run."""

    world_size: int  # ranks that train
    server_nodes: int  # nodes of servers, where they do not share the trainer's
    is_engine: bool  # Transformer Engine's layers
    assumed: Assumptions


@dataclass(frozen=True)
class Plan:
    """A layout and what it takes."""

    config: Config
    stages: tuple[Stage, ...]
    memories: tuple[Memory, ...]
    server: Server | None
    num_servers: int
    wires: tuple[Link, ...]
    time: StepTime
    num_micro_batches: int
    host_gib: float
    saves: Saves
    faults: tuple[str, ...]  # why it does not fit

    @property
    def gib(self) -> float:
        """Of the fullest GPU while it trains, without what is reserved."""
        return max(memory.total for memory in self.memories) / GIB


def check_tables(config: Config) -> None:
    """Return where Megatron takes `[optimizer]` and `[ddp]`. What only Transformer Engine's Adam can do is left aside.

    Raises:
        ConfigError: an unknown name, or values that Megatron refuses.
    """
    ddp_config(config)
    of_engine = (
        "use_precision_aware_optimizer",
        "main_params_dtype",
        "main_grads_dtype",
        "exp_avg_dtype",
        "exp_avg_sq_dtype",
    )
    plain = {name: value for name, value in config.optimizer.items() if name not in of_engine}
    optimizer_config(dataclasses.replace(config, optimizer=plain))


class Planner:
    """Plans of one model on given machines.

    Args:
        hf_config: config.json of the model.
        machines: where.

    Raises:
        ModelError: the family is unknown, or config.json is not as it needs.
        ConfigError: `[optimizer]` or `[ddp]` has an unknown name.
    """

    def __init__(self, hf_config: HfConfig, config: Config, machines: Machines) -> None:
        self.hf_config, self.machines, self._config = hf_config, machines, config
        check_tables(config)
        self.family = family_of(hf_config)
        self.vocab_size = self.family.model_fields(hf_config).vocab_size
        self._parts: Callable[[int], Parts] = functools.cache(lambda tensor: model_parts(hf_config, config, tensor))
        self.whole = self._parts(1)

    def transformer(self, config: Config) -> TransformerConfig:
        """Megatron's configuration, with what is recomputed.

        Raises:
            LayoutError: the layout does not divide the model.
            ConfigError: `[transformer]` has an unknown name, or Megatron refuses the whole.
        """
        found = transformer_config(self.family, self.hf_config, shapes_only(config), MetaPlatform())
        for name in (*RECOMPUTE, "distribute_saved_activations"):
            if name in config.transformer:  # kept from Megatron's own checks, which ask for Transformer Engine
                setattr(found, name, config.transformer[name])
        return found

    def plan(self, config: Config, stages: Sequence[Stage] | None = None) -> Plan:
        """What `config` takes.

        Args:
            stages: from `stages.build_stages`; None: added up from parts.

        Raises:
            LayoutError: it does not divide the model.
        """
        assumed, world = self.machines.assumed, self.machines.world_size
        transformer = self.transformer(config)
        if stages is None:
            stages = stages_of(self._parts(config.parallel.tensor_model_parallel_size), config, world)
        layers = [
            layer_bytes(
                transformer,
                layer,
                is_moe=is_moe,
                is_engine=self.machines.is_engine,
                mean_length=float(longest_sample(config)),
                expert_imbalance=assumed.expert_imbalance,
            )
            for layer, is_moe in enumerate(self.family.is_moe_layer(self.hf_config))
        ]
        to_do = work(config, assumed)
        micro = num_micro_batches(config, world, to_do)
        vocabulary = padded_vocab_size(
            self.vocab_size, config.model.make_vocab_size_divisible_by, transformer.tensor_model_parallel_size
        )
        memories = tuple(stage_memory(stage, config, transformer, layers, vocabulary, micro) for stage in stages)
        beside = int(assumed.reserve_gib * GIB)
        if config.sglang.colocate:
            beside += max(memory.parameters + memory.reference for memory in memories)
        server = server_memory(config, transformer, self.whole.total, beside, assumed)
        num_servers = self._num_servers(config)
        sizes = config.parallel
        model = sizes.tensor_model_parallel_size * sizes.pipeline_model_parallel_size * sizes.context_parallel_size
        wires = tuple(links(stages, config, transformer, world, to_do.num_trained * model / world, assumed))
        if server is not None:
            wires += (weights_link(config, transformer, world, self.whole.total, num_servers, assumed),)
        time = step_time(
            config,
            transformer,
            memories,
            server,
            wires,
            world_size=world,
            num_servers=num_servers,
            model_parameters=self.whole.total,
            active=self.whole.active(transformer),
            active_experts=self.whole.active_experts(transformer),
            assumed=assumed,
        )
        host = host_gib(memories, config, assumed)
        saved = saves(stages, config, self.whole.total, assumed)
        faults = tuple(self._faults(config, memories, server, host, saved))
        return Plan(config, tuple(stages), memories, server, num_servers, wires, time, micro, host, saved, faults)

    def _num_servers(self, config: Config) -> int:
        if urls := [url for url in config.sglang.server_urls.split(",") if url.strip()]:
            return len(urls)
        nodes = self.machines.server_nodes
        if config.sglang.colocate:
            nodes = max(1, self.machines.world_size // self.machines.assumed.gpus_per_node)
        return config.sglang.num_servers * nodes

    def _faults(
        self, config: Config, memories: Sequence[Memory], server: Server | None, host: float, saved: Saves
    ) -> Iterator[str]:
        assumed = self.machines.assumed
        sleeping = assumed.sleeping_server_gib if config.sglang.colocate else 0.0
        room = assumed.gpu_memory_gib - assumed.reserve_gib - sleeping
        index, fullest = max(enumerate(memories), key=lambda pair: pair[1].total)
        if (needed := fullest.total / GIB) > room:
            yield f"stage {index} needs {needed:.1f} GiB of a GPU while it trains; there are {room:.1f}"
        if server is not None:
            wanted = config.task.max_prompt_tokens + config.engine.max_response_tokens
            if server.tokens < wanted:
                yield (
                    f"a server's cache has {server.cache / GIB:.1f} GiB, room for {server.tokens} tokens; the longest sequence "
                    f"has {wanted}"
                )
            on_node = config.sglang.num_servers * server.num_gpus
            if on_node > assumed.gpus_per_node:
                yield f"{config.sglang.num_servers} servers of {server.num_gpus} GPUs do not go on {assumed.gpus_per_node}"
        if host > assumed.host_memory_gib:
            yield f"optimizer state takes {host:.0f} GiB of a node's host memory; there are {assumed.host_memory_gib:.0f}"
        elif host + (copy := saved.host_bytes / GIB) > assumed.host_memory_gib:
            yield (
                f"the copy of a checkpoint under async_save takes {copy:.0f} GiB of a node's host memory beside {host:.0f} of "
                f"optimizer state; there are {assumed.host_memory_gib:.0f}. Use --no-async-save"
            )

    def recomputing(self, config: Config) -> list[Plan]:
        """The same layout with nothing, the core attention and everything recomputed, each with half, all and twice the tokens."""
        kept = {name: value for name, value in config.transformer.items() if name not in RECOMPUTE}
        budget = config.train.max_tokens_per_micro_batch
        return [
            self.plan(
                dataclasses.replace(
                    config,
                    transformer=kept | mode,
                    train=dataclasses.replace(config.train, max_tokens_per_micro_batch=tokens),
                )
            )
            for mode in ({}, {"recompute_granularity": "selective"}, FULL)
            for tokens in (budget // 2, budget, 2 * budget)
        ]

    def propose(self) -> list[Plan]:
        """Layouts that divide and fit: the nearest first, and of equally near ones the fastest.

        Near is: few sizes changed, and by small factors. Recomputing more or fewer activations, and a smaller budget of
        tokens, are changes too.
        """
        found = []
        for config in self._candidates():
            try:
                validate(config, self.machines.world_size)
                plan = self.plan(config)
            except (LayoutError, ConfigError):
                continue
            if not plan.faults:
                found.append(plan)
        found.sort(key=lambda plan: (distance(self._config, plan.config), plan.time.total))
        nearest, seen = [], set()
        for plan in found:  # one of each layout: the nearest
            sizes = dataclasses.astuple(plan.config.parallel)
            if sizes not in seen:
                nearest.append(plan)
                seen.add(sizes)
        return nearest

    def _candidates(self) -> Iterator[Config]:
        config, world = self._config, self.machines.world_size
        sizes = config.parallel
        divisors = [size for size in range(1, world + 1) if world % size == 0]
        tensors = [size for size in divisors if size <= self.machines.assumed.gpus_per_node]
        experts = [1]
        if self.whole.num_experts:
            experts = [size for size in divisors if self.whole.num_experts % size == 0]
        stages = [size for size in divisors if len(self.whole.layers) % size == 0]
        contexts = sorted({1, sizes.context_parallel_size})
        plain = {name: value for name, value in config.transformer.items() if name not in RECOMPUTE}
        tables = [config.transformer, plain | FULL] + ([plain] if config.transformer != plain else [])
        longest = config.task.max_prompt_tokens + config.engine.max_response_tokens
        budget = config.train.max_tokens_per_micro_batch
        budgets = [budget] + ([max(longest, budget // 2)] if budget // 2 >= longest else [])
        for tensor, pipeline, expert, context in itertools.product(tensors, stages, experts, contexts):
            if world % (tensor * pipeline * context):
                continue
            pieces = sizes.virtual_pipeline_model_parallel_size if pipeline == sizes.pipeline_model_parallel_size else 1
            layout = dataclasses.replace(
                sizes,
                tensor_model_parallel_size=tensor,
                pipeline_model_parallel_size=pipeline,
                virtual_pipeline_model_parallel_size=pieces,
                expert_model_parallel_size=expert,
                expert_tensor_parallel_size=0 if expert == 1 else sizes.expert_tensor_parallel_size,
                context_parallel_size=context,
                sequence_parallel=tensor > 1,
            )
            for table, tokens in itertools.product(tables, budgets):
                train = dataclasses.replace(config.train, max_tokens_per_micro_batch=tokens)
                yield dataclasses.replace(config, parallel=layout, transformer=table, train=train)


def distance(one: Config, other: Config) -> float:
    """How far two layouts are: factors of two between their sizes; changed recomputation and budget count half.

    >>> a = Config()
    >>> b = dataclasses.replace(a, parallel=dataclasses.replace(a.parallel, tensor_model_parallel_size=4))
    >>> distance(a, b)
    2.0
    """
    names = ("tensor", "pipeline", "expert", "context")
    found = 0.0
    for name in names:
        field = f"{name}_parallel_size" if name == "context" else f"{name}_model_parallel_size"
        found += abs(math.log2(getattr(one.parallel, field) / getattr(other.parallel, field)))
    found += 0.5 * any(one.transformer.get(name) != other.transformer.get(name) for name in RECOMPUTE)
    budgets = one.train.max_tokens_per_micro_batch, other.train.max_tokens_per_micro_batch
    return found + 0.5 * abs(math.log2(budgets[0] / budgets[1]))
