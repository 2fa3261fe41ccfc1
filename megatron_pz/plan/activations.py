"""Bytes that a layer keeps from its forward for its backward, by formula: routers cannot run on the meta device.

The formula lists what each step saves for autograd. For the local layers it is checked against what they do save
(tests/plan/test_activations.py). For Transformer Engine it was written from its layers' code and has not been measured: they
save the same, but for the inputs of the query and key norms (more), and the products inside an expert (fewer).

Per token of the rank: H hidden size; Q, K widths of queries and of keys on this rank; F width of the MLP on this rank;
b bytes of an element. Where the sequence is sharded between tensor-parallel ranks, what lies outside the attention and the MLP is too.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.transformer.transformer_config import TransformerConfig

FLOAT32 = 4
INT64 = 8


@dataclass(frozen=True)
class Layer:
    """Bytes a token of the rank, by what recomputation can drop."""

    input: float  # of the layer itself: all that is left under full recomputation
    attention: float
    core_attention: float  # that a recomputed core attention does not keep
    norm: float  # the norm's output, before the experts
    mlp: float  # that a recomputed MLP, or layer of experts, does not keep
    expert_activation: float  # of these, the activation's output

    @property
    def total(self) -> float:
        return self.input + self.attention + self.core_attention + self.norm + self.mlp


def layer_bytes(
    config: TransformerConfig, layer: int, *, is_moe: bool, is_engine: bool, expert_imbalance: float = 1.0
) -> Layer:
    """What layer number `layer` (from 0) keeps.

    Args:
        config: of the model and its layout.
        is_engine: Transformer Engine's layers, else the local ones.
        expert_imbalance: tokens of the rank whose experts get most, over the mean.
    """
    b, tensor = config.params_dtype.itemsize, config.tensor_model_parallel_size
    heads, groups, dim = (
        config.num_attention_heads // tensor,
        max(1, config.num_query_groups // tensor),
        config.kv_channels,
    )
    query, key = heads * dim, groups * dim
    shards = tensor if config.sequence_parallel else 1
    hidden, statistic = config.hidden_size * b / shards, FLOAT32 / shards
    has_rope = not (config.no_rope_freq and config.no_rope_freq[layer])

    attention = statistic + hidden  # norm, input of the projection to query, key and value
    attention += (query + 2 * key) * b  # its output
    if config.qk_layernorm:
        attention += FLOAT32 * (heads + groups) + is_engine * (query + key) * b
    if has_rope and not is_engine:
        attention += 2 * dim * b  # cosines and sines
    # The local context-parallel attention keeps the keys and values that it gathered.
    copies = 1 if is_engine else config.context_parallel_size
    attention += (
        query + 2 * key * copies
    ) * b + query * b  # into the core attention; into the projection of its output
    # Transformer Engine hands on the output that the core attention keeps; the local one joins sequences to another tensor.
    core_attention = FLOAT32 * heads + (0 if is_engine else query * b)

    mlp_input = hidden + statistic  # of the norm
    if not is_moe:
        mlp = 3 * config.ffn_hidden_size // tensor * b  # the activation's input and output
        return Layer(hidden, attention + mlp_input, core_attention, hidden, mlp, 0.0)
    experts, chosen = config.num_moe_experts, config.moe_router_topk
    # Every token of this rank goes to `chosen` experts; those of the ranks that share an expert come together.
    rows = chosen * config.expert_tensor_parallel_size / shards * expert_imbalance
    width = config.moe_ffn_hidden_size // config.expert_tensor_parallel_size
    activation = rows * width * b
    routing = (chosen * (2 * INT64 + FLOAT32) + experts * (1 + FLOAT32)) / shards
    products = 3 if is_engine else 6  # of the gate and the up-projection, by Megatron's own code one by one
    mlp = routing + rows * (config.hidden_size * b + FLOAT32) + products * activation
    return Layer(hidden, attention + mlp_input, core_attention, hidden, mlp, activation)


def kept(
    config: TransformerConfig, layers: list[Layer], stage_layers: tuple[int, ...], pieces: int
) -> tuple[float, float]:
    """Bytes a token that a stage's layers keep from one forward, and that are added while one backward recomputes.

    Args:
        config: says what is recomputed.
        layers: of the whole model.
        stage_layers: numbers of the stage's layers.
        pieces: model chunks that they are split into.
    """
    own = [layers[index] for index in stage_layers]
    if config.recompute_granularity == "full":
        size = config.recompute_num_layers or 1
        piece = max(1, len(own) // pieces)
        retained, again = 0.0, [0.0]
        for start in range(0, len(own), piece):
            part = own[start : start + piece]
            if config.recompute_method == "block":
                retained += sum(layer.input if at < size else layer.total for at, layer in enumerate(part))
                again += [layer.total - layer.input for layer in part[:size]]
            else:
                units = [part[at : at + size] for at in range(0, len(part), size)]
                retained += sum(unit[0].input for unit in units)
                again += [sum(layer.total for layer in unit) - unit[0].input for unit in units]
        share = config.tensor_model_parallel_size if config.distribute_saved_activations else 1
        return retained / share, max(again)
    modules = config.recompute_modules or [] if config.recompute_granularity == "selective" else []
    return sum(_selective(layer, modules) for layer in own), max(
        (_dropped(layer, modules) for layer in own), default=0.0
    )


def _selective(layer: Layer, modules: list[str]) -> float:
    return layer.total - _dropped(layer, modules)


def _dropped(layer: Layer, modules: list[str]) -> float:
    is_moe = layer.expert_activation > 0
    dropped = layer.core_attention if "core_attn" in modules else 0.0
    if "layernorm" in modules and is_moe:  # the others' norms are part of the projection that follows
        dropped += layer.norm
    if ("moe" if is_moe else "mlp") in modules:
        dropped += layer.mlp
    elif "moe_act" in modules:
        dropped += layer.expert_activation
    return dropped


def in_flight(stages: int, stage: int, pieces: int, num_micro_batches: int) -> float:
    """Micro-batches whose activations a stage holds at most, in units of all its layers: 1F1B, or interleaved in pieces.

    >>> in_flight(4, 0, 1, 100), in_flight(4, 3, 1, 100), in_flight(4, 0, 2, 100), in_flight(4, 0, 1, 2), in_flight(1, 0, 1, 9)
    (4.0, 1.0, 5.5, 2.0, 1.0)
    """
    if pieces == 1:
        return float(min(stages - stage, num_micro_batches))
    ahead = 2 * (stages - stage - 1) + (pieces - 1) * stages + 1
    return min(ahead, num_micro_batches * pieces) / pieces
