"""Bytes of every part of a run on the GPUs of each pipeline stage."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_pz.config.rules import GAMES
from megatron_pz.config.schema import Config
from megatron_pz.plan.activations import (
    Layer,
    Row,
    Unit,
    embedding_bytes,
    fullest,
    head_input_bytes,
    in_flight,
    sent_bytes,
    units,
)
from megatron_pz.plan.assumptions import GIB, Assumptions
from megatron_pz.plan.stages import Buffer, Stage
from megatron_pz.platform.base import DTYPES

FLOAT32 = 4


@dataclass(frozen=True)
class Memory:
    """Bytes on a GPU of one stage, at the fullest moment of an update."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int  # kept for the backward, of all micro-batches under way, and what recomputation adds
    head: int  # logits of a chunk, and the head's gradient before it is added
    reference: int  # weights of the first policy, where there is a KL term
    host: int  # optimizer state in host memory, of this rank

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.head + self.reference


@dataclass(frozen=True)
class Server:
    """Memory of an SGLang server, on each of its GPUs."""

    num_gpus: int
    weights: int
    cache: int  # below 0: the weights have no room
    token: int  # bytes that a token takes in the cache

    @property
    def tokens(self) -> int:
        """Tokens that the cache of the server holds."""
        return max(0, self.cache) // self.token


def state(stage: Stage, config: Config) -> tuple[int, int, int]:
    """Bytes of parameters, gradients and optimizer state, all on one device.

    Masters in float32 are kept where parameters are narrower; Adam has two moments. With Transformer Engine's
    `use_precision_aware_optimizer` each has the width that `[optimizer]` names.
    """
    parameters = sum(buffer.num_elements * buffer.parameter_bytes for buffer in stage.buffers)
    gradients = sum(buffer.num_elements * buffer.gradient_bytes for buffer in stage.buffers)
    optimizer = sum(buffer.shard_parameters * optimizer_width(buffer, config.optimizer) for buffer in stage.buffers)
    return parameters, gradients, optimizer


def optimizer_width(buffer: Buffer, table: Mapping[str, Any]) -> int:
    """Bytes of optimizer state for a parameter."""

    def width(name: str) -> int:
        return DTYPES[found].itemsize if isinstance(found := table.get(name), str) else FLOAT32

    is_half = buffer.parameter_bytes < FLOAT32
    if not table.get("use_precision_aware_optimizer"):
        return 2 * FLOAT32 + is_half * FLOAT32
    master = width("main_params_dtype")
    if master == FLOAT32 and is_half and table.get("store_param_remainders", _default("store_param_remainders")):
        master -= buffer.parameter_bytes  # the parameter is the other half
    return master + width("exp_avg_dtype") + width("exp_avg_sq_dtype")


def _default(name: str) -> Any:
    return next((field.default for field in dataclasses.fields(OptimizerConfig) if field.name == name), None)


def longest_sample(config: Config) -> int:
    """Tokens of the longest sample that there can be."""
    if config.task.task in GAMES:
        return config.task.max_prompt_tokens + config.engine.max_response_tokens
    return config.corpus.max_paragraph_tokens


def longest_row(config: Config) -> int:
    """Tokens of the fullest micro-batch: the budget, or one sample that is longer."""
    return max(config.train.max_tokens_per_micro_batch, longest_sample(config))


def fullest_row(config: Config) -> Row:
    """The fullest micro-batch, as if all its samples were of the greatest length."""
    longest = longest_sample(config)
    tokens = math.ceil(longest_row(config) / config.parallel.context_parallel_size)
    return Row(tokens, longest, float(longest))


def stage_memory(
    stage: Stage,
    config: Config,
    transformer: TransformerConfig,
    layers: Sequence[Layer],
    vocab_size: int,
    num_micro_batches: int,
) -> Memory:
    """What a rank of `stage` takes while it trains.

    Args:
        layers: of the whole model, from `activations.layer_bytes`.
        vocab_size: with its padding.
        num_micro_batches: of an update, on each data-parallel rank.
    """
    parameters, gradients, optimizer = state(stage, config)
    share = config.optimizer.get("optimizer_offload_fraction", 0.0)
    host = int(optimizer * share) if config.optimizer.get("optimizer_cpu_offload") else 0
    activations = stage_activations(stage, config, transformer, layers, fullest_row(config), num_micro_batches)
    head = head_bytes(config, transformer, vocab_size) if stage.has_head else 0.0
    reference = 0
    if config.train.kl_coef > 0:
        reference = sum(buffer.num_parameters * buffer.parameter_bytes for buffer in stage.buffers)
    return Memory(parameters, gradients, optimizer - host, activations, int(head), reference, host)


def stage_activations(
    stage: Stage,
    config: Config,
    transformer: TransformerConfig,
    layers: Sequence[Layer],
    row: Row,
    num_micro_batches: int,
) -> int:
    """Bytes that a rank of `stage` keeps for its backward at the fullest moment of an update.

    Args:
        row: the fullest micro-batch. The rest as of `stage_memory`.
    """
    stages, pieces = config.parallel.pipeline_model_parallel_size, config.parallel.virtual_pipeline_model_parallel_size
    size = len(stage.layers) // pieces
    chunks = [
        units(transformer, [layers[layer] for layer in stage.layers[at : at + size]], row)
        for at in range(0, len(stage.layers), size)
    ]
    if stage.index == 0:
        chunks[0].insert(0, Unit(embedding_bytes(transformer)))
    for chunk in chunks[: -1 if stage.has_head else None]:
        chunk.append(Unit(sent_bytes(transformer)))
    head = head_input_bytes(transformer) if stage.has_head else 0.0
    held = in_flight(stages, stage.index, pieces, num_micro_batches)
    kept = fullest(chunks, held, head)
    if pieces == 1 and not stage.has_head and num_micro_batches > held:
        kept += sent_bytes(transformer)  # of the micro-batch before: the schedule lets go of it late
    return int(row.tokens * kept)


FUSED_GRADIENT_BYTES = 256 * 2**20
"""`models.kernels.fused_log_probs.GRADIENT_BYTES`, which cannot be imported without Triton."""


def head_bytes(config: Config, transformer: TransformerConfig, vocab_size: int) -> float:
    """Bytes of the head besides its weight.

    Chunked (`models.logprobs`): one chunk's logits, in the model's precision and in float32 with their exponentials, and of the
    head's gradient a float32 sum over chunks, a chunk's part and the result. Fused (`models.kernels`): the gradient of some columns
    of logits, a float32 sum and a product of the hidden states' gradient, and the head's gradient.
    """
    rows, b = vocab_size // transformer.tensor_model_parallel_size, transformer.params_dtype.itemsize
    if config.train.log_prob_kernel == "fused":
        tokens, width = longest_row(config), transformer.hidden_size
        return min(tokens * rows * b, FUSED_GRADIENT_BYTES) + tokens * width * 2 * FLOAT32 + rows * width * b
    chunk = config.train.log_prob_chunk_tokens * rows * (2 * FLOAT32 + (b if b < FLOAT32 else 0))
    gradient = rows * transformer.hidden_size * (FLOAT32 + (2 * b if b < FLOAT32 else 0))
    return chunk + gradient


def server_memory(
    config: Config, transformer: TransformerConfig, model_parameters: int, beside: int, assumed: Assumptions
) -> Server | None:
    """A server's memory; None where the embedded engine generates.

    Args:
        model_parameters: of the whole model.
        beside: bytes of the trainer's that stay on the GPU while servers generate.
    """
    if config.engine.engine != "sglang":
        return None
    num_gpus = int(config.server.get("tp-size", 0) or max(1, config.sglang.gpus_per_server))
    fraction = float(config.server.get("mem-fraction-static", assumed.server_memory_fraction))
    b = transformer.params_dtype.itemsize
    groups = max(1, transformer.num_query_groups // num_gpus)
    token = 2 * transformer.num_layers * groups * transformer.kv_channels * b
    weights = math.ceil(model_parameters * b / num_gpus)
    free = assumed.gpu_memory_gib * GIB - beside
    return Server(num_gpus, weights, int(free * fraction) - weights, token)
