"""Bytes that a layer keeps from its forward for its backward, by formula: routers cannot run on the meta device.

The formula lists what each step saves for autograd. For the local layers it is checked against what real updates save, rank by
rank (tests/plan/test_memory.py). For Transformer Engine it was written from its layers' code and has not been measured: they
save the same, but for the inputs of the query and key norms (more), and the products inside an expert (fewer).

Per token of the rank: H hidden size; Q, K widths of queries and of keys on this rank; F width of the MLP on this rank;
b bytes of an element. Where the sequence is sharded between tensor-parallel ranks, what lies outside the attention and the MLP is too.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.transformer.transformer_config import TransformerConfig

FLOAT32 = 4
INT64 = 8
LOSS = 9  # numbers a token that the loss keeps


@dataclass(frozen=True)
class Row:
    """The fullest micro-batch."""

    tokens: int  # of this rank
    longest: int  # tokens of its longest sequence, on all ranks that share it
    mean: float  # length of the sequence in which a token stands, over all tokens


@dataclass(frozen=True)
class Layer:
    """Bytes a token of the rank, by what recomputation can drop."""

    input: float  # of the layer itself: all that is left under full recomputation
    attention: float
    core_attention: float  # that a recomputed core attention does not keep
    residual: float  # input of the second norm
    norm: float  # the norm's output, before the experts
    mlp: float  # that a recomputed MLP, or layer of experts, does not keep
    expert_activation: float  # of these, the activation's output

    @property
    def total(self) -> float:
        return self.input + self.attention + self.core_attention + self.residual + self.norm + self.mlp


def layer_bytes(
    config: TransformerConfig,
    layer: int,
    *,
    is_moe: bool,
    is_engine: bool,
    mean_length: float,
    expert_imbalance: float = 1.0,
) -> Layer:
    """What layer number `layer` (from 0) keeps.

    Args:
        config: of the model and its layout.
        is_engine: Transformer Engine's layers, else the local ones.
        mean_length: `Row.mean`, of account for the local layers under context parallelism only.
        expert_imbalance: tokens of the rank whose experts get most, over the mean.
    """
    b, tensor = config.params_dtype.itemsize, config.tensor_model_parallel_size
    shards = tensor if config.sequence_parallel else 1
    hidden, statistic = config.hidden_size * b / shards, FLOAT32 / shards
    has_rope = not (config.no_rope_freq and config.no_rope_freq[layer])
    core_attention, between = (
        _engine_attention(config) if is_engine else _local_attention(config, has_rope, mean_length)
    )
    attention = statistic + hidden + between  # norm, input of the projection to query, key and value
    residual = hidden + statistic
    if not is_moe:
        mlp = 3 * config.ffn_hidden_size // tensor * b  # the activation's input and output
        return Layer(hidden, attention, core_attention, residual, hidden, mlp, 0.0)
    experts, chosen = config.num_moe_experts, config.moe_router_topk
    # Every token of this rank goes to `chosen` experts; those of the ranks that share an expert come together.
    rows = chosen * config.expert_tensor_parallel_size / shards * expert_imbalance
    width = config.moe_ffn_hidden_size // config.expert_tensor_parallel_size
    activation = rows * width * b
    routing = (chosen * (2 * INT64 + FLOAT32) + experts * (1 + FLOAT32)) / shards
    products = 3 if is_engine else 6  # of the gate and the up-projection, by Megatron's own code one by one
    mlp = routing + rows * (config.hidden_size * b + FLOAT32) + products * activation
    return Layer(hidden, attention, core_attention, residual, hidden, mlp, activation)


def _heads(config: TransformerConfig) -> tuple[int, int]:
    """Query heads, and key heads, of this rank."""
    tensor = config.tensor_model_parallel_size
    return config.num_attention_heads // tensor, max(1, config.num_query_groups // tensor)


def _engine_attention(config: TransformerConfig) -> tuple[float, float]:
    """Bytes that a recomputed core attention does not keep, and what else lies between the two projections."""
    b, (heads, groups) = config.params_dtype.itemsize, _heads(config)
    query, key = heads * config.kv_channels, groups * config.kv_channels
    between = (query + 2 * key) * b  # output of the projection
    if config.qk_layernorm:
        between += FLOAT32 * (heads + groups) + (query + key) * b
    # Into the core attention, whose output goes into the projection as it is.
    return FLOAT32 * heads, between + (query + 2 * key) * b + query * b


def _local_attention(config: TransformerConfig, has_rope: bool, mean_length: float) -> tuple[float, float]:
    """As `_engine_attention`."""
    b, ranks, (heads, groups) = config.params_dtype.itemsize, config.context_parallel_size, _heads(config)
    dim = config.kv_channels
    query, key = heads * dim * b, groups * dim * b
    mixed = query + 2 * key  # output of the projection
    tables = 2 * dim * b if has_rope else 0  # cosines and sines
    between = query  # into the projection of the output
    if config.qk_layernorm:  # `local_math.split_heads`: it keeps its input, and gives copies
        between += mixed + FLOAT32 * (heads + groups) + tables + query
        if groups == 1:
            between += key  # the queries are a part of the tensor from which keys were copied
        own = 2 * key
    else:  # Megatron's own steps: what is not rotated is a part of the projection's output, which then stays
        is_copied = has_rope or groups > 1  # the queries
        between += 2 * tables + (query if is_copied else mixed)  # tables for queries, and for keys
        own = (mixed if is_copied else 0) + (key if has_rope else 0)
    core = FLOAT32 * heads + query  # sequence by sequence, joined to another tensor
    if ranks > 1:
        # All ranks' keys and values are kept instead of this rank's. Gathered again by a recomputed core attention.
        core += 2 * key * ranks - own
        # A mask for both chunks of each sequence, against the keys before their ends.
        core += (2 * ranks + 1) / (4 * ranks) * mean_length * b
    return core, between + own


def embedding_bytes(config: TransformerConfig) -> float:
    """Bytes a token that the embedding keeps: token ids, and which of them other tensor-parallel ranks have."""
    return INT64 + (config.tensor_model_parallel_size > 1)


def sent_bytes(config: TransformerConfig) -> float:
    """Bytes a token of what a stage sent to the next, which it keeps for the backward unless Megatron is told to empty it."""
    shards = config.tensor_model_parallel_size if config.sequence_parallel else 1
    return 0.0 if config.deallocate_pipeline_outputs else config.hidden_size * config.params_dtype.itemsize / shards


def head_input_bytes(config: TransformerConfig) -> float:
    """Bytes a token that the final norm, the head and the loss keep, where every token is trained."""
    hidden = config.hidden_size * config.params_dtype.itemsize
    shards = config.tensor_model_parallel_size if config.sequence_parallel else 1
    return (hidden + FLOAT32) / shards + hidden + 2 * INT64 + (2 + LOSS) * FLOAT32


@dataclass(frozen=True)
class Unit:
    """Layers that are recomputed together, or one that is kept. Bytes a token."""

    kept: float
    again: float = 0.0  # on top of what is kept then, while its backward runs it again


def units(config: TransformerConfig, layers: list[Layer], row: Row) -> list[Unit]:
    """What a model chunk of these layers keeps, in the order of the forward."""
    if config.recompute_granularity != "full":
        modules = config.recompute_modules or [] if config.recompute_granularity == "selective" else []
        return [_selective(layer, modules) for layer in layers]
    size = config.recompute_num_layers or 1
    share = config.tensor_model_parallel_size if config.distribute_saved_activations else 1
    angles = FLOAT32 * config.kv_channels * row.longest / row.tokens  # one table, handed to every unit
    is_block = config.recompute_method == "block"
    found = [Unit(angles)]
    for start in range(0, len(layers), 1 if is_block else size):
        if is_block and start >= size:
            found.append(Unit(layers[start].total))
        else:
            part = layers[start : start + (1 if is_block else size)]
            total, kept = sum(layer.total for layer in part), part[0].input / share
            found.append(Unit(kept, total - part[0].input))
    return found


def _selective(layer: Layer, modules: list[str]) -> Unit:
    is_moe = layer.expert_activation > 0
    core = layer.core_attention if "core_attn" in modules else 0.0
    # The others' norms are part of the projection that follows.
    norm = layer.norm if "layernorm" in modules and is_moe else 0.0
    mlp = 0.0
    if ("moe" if is_moe else "mlp") in modules:
        mlp = layer.mlp
    elif "moe_act" in modules:
        mlp = layer.expert_activation
    # The attention runs again when what follows it is done with.
    kept_behind = layer.residual + layer.norm - norm + layer.mlp - mlp
    return Unit(layer.total - core - norm - mlp, max(norm + mlp, core - kept_behind))


def fullest(chunks: list[list[Unit]], held: float, head: float) -> float:
    """Bytes a token at the fullest moment: all is kept, or a backward has something run again.

    Args:
        chunks: of a stage; the last one has the head, if the stage has it.
        held: micro-batches under way, in units of all chunks.
        head: what the head keeps.

    >>> fullest([[Unit(1.0, 5.0), Unit(1.0, 5.0)]], 1.0, 3.0), fullest([[Unit(1.0, 5.0), Unit(4.0)]], 2.0, 3.0)
    (7.0, 13.0)
    """
    whole, most = sum(unit.kept for units in chunks for unit in units), 0.0
    for at, chunk in enumerate(chunks):
        below = held * whole - sum(unit.kept for unit in chunk)  # of other chunks and micro-batches
        for unit in chunk:
            below += unit.kept
            most = max(most, below + unit.again)
        most = max(most, below + (head if at == len(chunks) - 1 else 0.0))
    return most


def in_flight(stages: int, stage: int, pieces: int, num_micro_batches: int) -> float:
    """Micro-batches whose activations a stage holds at most, in units of all its layers: 1F1B, or interleaved in pieces.

    >>> in_flight(4, 0, 1, 100), in_flight(4, 3, 1, 100), in_flight(4, 0, 2, 100), in_flight(4, 0, 1, 2), in_flight(1, 0, 1, 9)
    (4.0, 1.0, 5.5, 2.0, 1.0)
    """
    if pieces == 1:
        return float(min(stages - stage, num_micro_batches))
    ahead = 2 * (stages - stage - 1) + (pieces - 1) * stages + 1
    return min(ahead, num_micro_batches * pieces) / pieces
