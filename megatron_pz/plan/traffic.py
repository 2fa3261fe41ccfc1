"""What a GPU sends in one step, by the kind of parallelism, and over which wire.

Bytes are those that the algorithm asks of each rank: 2 (n - 1) / n of a tensor for an all-reduce of n ranks, (n - 1) / n for
an all-gather, a reduce-scatter and an all-to-all. A ring goes at the pace of its slowest wire; of an all-to-all the share that
leaves the node does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_pz.config.schema import Config
from megatron_pz.plan.assumptions import Assumptions
from megatron_pz.plan.stages import Stage

GB = 1e9
WEIGHTS = "weights to servers"


@dataclass(frozen=True)
class Link:
    """One kind of traffic of one rank."""

    name: str
    num_ranks: int  # that talk with one another
    num_nodes: int  # that they are on
    num_bytes: float  # sent in a step by the rank that sends most
    seconds: float


@dataclass(frozen=True)
class Group:
    """Ranks at equal distances, from rank 0 on."""

    size: int
    stride: int

    def num_nodes(self, gpus_per_node: int) -> int:
        """Nodes that the group's ranks are on."""
        return len({place * self.stride // gpus_per_node for place in range(self.size)})


def groups(config: Config, transformer: TransformerConfig, world_size: int) -> dict[str, Group]:
    """Megatron's groups of rank 0, whose order of ranks is tensor, context, (expert,) data, pipeline."""
    sizes = config.parallel
    tensor, context, stages = (
        sizes.tensor_model_parallel_size,
        sizes.context_parallel_size,
        sizes.pipeline_model_parallel_size,
    )
    in_stage = world_size // stages
    expert_tensor, experts = transformer.expert_tensor_parallel_size or 1, sizes.expert_model_parallel_size
    return {
        "tensor": Group(tensor, 1),
        "context": Group(context, tensor),
        "data": Group(in_stage // tensor, tensor),  # with context: they have the same weights
        "pipeline": Group(stages, in_stage),
        "expert tensor": Group(expert_tensor, 1),
        "expert": Group(experts, expert_tensor),
        "expert data": Group(in_stage // (expert_tensor * experts), expert_tensor * experts),
    }


def links(
    stages: Sequence[Stage],
    config: Config,
    transformer: TransformerConfig,
    world_size: int,
    tokens: float,
    assumed: Assumptions,
) -> list[Link]:
    """Traffic of an update. Kinds that a layout does not have are left out.

    Args:
        tokens: that one replica of the model trains on in a step.
    """
    of = groups(config, transformer, world_size)
    b, hidden = transformer.params_dtype.itemsize, transformer.hidden_size
    tensor, context = of["tensor"].size, of["context"].size
    passes = 3 if transformer.recompute_granularity == "full" else 2  # forwards, and the backward
    local = tokens / context
    row = local * hidden * b  # of hidden states, before tensor-parallel ranks share them
    shard = row / (tensor if transformer.sequence_parallel else 1)
    own_layers = max(len(stage.layers) for stage in stages)
    chosen = transformer.moe_router_topk if transformer.num_moe_experts else 0
    found = []

    def add(name: str, group: str, num_bytes: float, outside: float | None = None) -> None:
        if of[group].size > 1 and num_bytes:
            found.append(_link(name, of[group], num_bytes, assumed, outside))

    halves = 1 if chosen else 2  # attention, and the MLP where it is dense
    gathers = 0.5 if transformer.sequence_parallel else 0.0  # of inputs, once more, for the weights' gradients
    add("tensor", "tensor", own_layers * halves * 2 * (passes + gathers) * row * _part(tensor))
    add("context", "context", own_layers * (passes + 1) * 2 * local * _keys(transformer) * b * (context - 1))
    rows = shard * chosen * assumed.expert_imbalance
    add("expert", "expert", own_layers * 2 * passes * rows * _part(of["expert"].size), _outside(of["expert"], assumed))
    width = of["expert tensor"].size
    add("expert tensor", "expert tensor", own_layers * 2 * passes * shard * chosen * (width - 1))
    add("pipeline", "pipeline", 2 * shard * config.parallel.virtual_pipeline_model_parallel_size)
    for name, group, is_expert in (("data", "data", False), ("expert data", "expert data", True)):
        add(name, group, max(_update_bytes(stage, is_expert, config) for stage in stages))
    return found


def weights_link(
    config: Config,
    transformer: TransformerConfig,
    world_size: int,
    model_parameters: int,
    num_servers: int,
    assumed: Assumptions,
) -> Link:
    """The new weights' way to the servers, once a step: gathered on the ranks that hand them on, then handed on.

    Colocated servers read them where every rank gathered them. `distributed` sends them once round all servers, `disk` once to a
    file, `tensor` to each server in requests.
    """
    sizes, sglang, per_node = config.parallel, config.sglang, assumed.gpus_per_node
    model = float(model_parameters * transformer.params_dtype.itemsize)
    width = (transformer.expert_tensor_parallel_size or 1) * sizes.expert_model_parallel_size
    replica = max(sizes.tensor_model_parallel_size * sizes.context_parallel_size, width)
    is_inside = replica * sizes.pipeline_model_parallel_size <= per_node
    handed, pace = 0.0, assumed.node_gb_per_s
    if not (sglang.colocate and sglang.weight_transport == "tensor"):
        num_gpus = 0 if sglang.colocate else num_servers * max(1, sglang.gpus_per_server)
        handed = model * (num_servers if sglang.weight_transport == "tensor" else 1)
        pace = {
            "disk": assumed.disk_gb_per_s,
            "tensor": assumed.request_gb_per_s,
            "distributed": assumed.node_gb_per_s if world_size + num_gpus <= per_node else assumed.network_gb_per_s,
        }[sglang.weight_transport]
    seconds = model / GB / (assumed.node_gb_per_s if is_inside else assumed.network_gb_per_s) + handed / GB / pace
    others = 0 if sglang.colocate else -(-num_servers * max(1, sglang.gpus_per_server) // per_node)
    return Link(WEIGHTS, num_servers + 1, max(1, -(-world_size // per_node)) + others, model + handed, seconds)


def _update_bytes(stage: Stage, is_expert: bool, config: Config) -> float:
    """Gradients summed and parameters spread, in all updates of a step."""
    total = 0.0
    for buffer in stage.buffers:
        if buffer.is_expert is is_expert:
            spread = buffer.parameter_bytes if config.parallel.use_distributed_optimizer else buffer.gradient_bytes
            total += buffer.num_elements * (buffer.gradient_bytes + spread) * _part(buffer.num_ranks)
    return total * config.train.updates_per_batch


def _keys(transformer: TransformerConfig) -> float:
    """Width of the keys on a rank."""
    return max(1, transformer.num_query_groups // transformer.tensor_model_parallel_size) * transformer.kv_channels


def _part(size: int) -> float:
    return (size - 1) / size


def _outside(group: Group, assumed: Assumptions) -> float:
    """Share of an all-to-all that goes to other nodes."""
    inside = sum(place * group.stride // assumed.gpus_per_node == 0 for place in range(group.size))
    return (group.size - inside) / max(1, group.size - 1)


def _link(name: str, group: Group, num_bytes: float, assumed: Assumptions, outside: float | None) -> Link:
    num_nodes = group.num_nodes(assumed.gpus_per_node)
    share = outside if outside is not None else float(num_nodes > 1)
    seconds = max(share / assumed.network_gb_per_s, (1 - share) / assumed.node_gb_per_s) * num_bytes / GB
    return Link(name, group.size, num_nodes, num_bytes, seconds)
