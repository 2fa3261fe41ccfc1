"""How long a step takes, by counting: operations over the peak, bytes over the wires. An estimate to compare layouts with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_pz.config.rules import GAMES
from megatron_pz.config.schema import Config
from megatron_pz.plan.assumptions import GIB, Assumptions
from megatron_pz.plan.memory import Memory, Server, longest_row
from megatron_pz.plan.traffic import GB, WEIGHTS, Link


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step's parts; `total` counts what runs beside something else once."""

    play: float
    compute: float
    bubble: float
    communicate: float
    optimizer: float
    move: float  # gradients and optimizer state to host memory and back
    sync: float
    overlaps: bool  # play runs beside the update

    @property
    def train(self) -> float:
        return self.compute + self.bubble + self.communicate + self.optimizer

    @property
    def total(self) -> float:
        both = max(self.play, self.train) if self.overlaps else self.play + self.train
        return both + self.move + self.sync


@dataclass(frozen=True)
class Work:
    """Tokens of a step."""

    num_rollouts: int
    num_generated: float  # sampled tokens
    num_trained: float  # tokens of the samples that are trained on, prompts included
    sample_tokens: float  # mean length


def work(config: Config, assumed: Assumptions) -> Work:
    """What a step has to do. Without a game it is the paragraphs themselves."""
    task = config.task
    if task.task not in GAMES:
        length = (config.corpus.min_paragraph_tokens + config.corpus.max_paragraph_tokens) / 2
        return Work(task.paragraphs_per_step, 0.0, task.paragraphs_per_step * length, length)
    masks = task.paragraphs_per_step * (1 if task.task == "rlvr" else task.n_masks_per_paragraph)
    rollouts = masks * task.n_predictions_per_mask + (masks if task.task == "pretrain_zero" else 0)
    length = assumed.mean_prompt_tokens + assumed.mean_response_tokens
    return Work(rollouts, rollouts * assumed.mean_response_tokens, rollouts * assumed.trained_share * length, length)


def num_micro_batches(config: Config, world_size: int, to_do: Work) -> int:
    """Of an update, on each data-parallel rank; 95 % full."""
    sizes = config.parallel
    model = sizes.tensor_model_parallel_size * sizes.pipeline_model_parallel_size * sizes.context_parallel_size
    tokens = to_do.num_trained / max(1, world_size // model) / config.train.updates_per_batch
    return max(1, math.ceil(tokens / (0.95 * longest_row(config))))


def step_time(
    config: Config,
    transformer: TransformerConfig,
    memories: Sequence[Memory],
    server: Server | None,
    wires: Sequence[Link],
    *,
    world_size: int,
    num_servers: int,
    model_parameters: int,
    active: float,
    active_experts: float,
    assumed: Assumptions,
) -> StepTime:
    """Seconds of a step.

    Args:
        num_servers: SGLang servers in all.
        model_parameters: of the whole model.
        active: parameters that a token is multiplied with.
        active_experts: those of them that are experts'; the rank that has most tokens for its own keeps the others waiting.
    """
    to_do, peak = work(config, assumed), assumed.peak_tflops * 1e12 * assumed.mfu
    # Every token and parameter: multiply and add, in the forward and twice in the backward; attention sees half of each sequence.
    width = transformer.num_attention_heads * transformer.kv_channels
    waited_for = active + (assumed.expert_imbalance - 1) * active_experts
    forward = 2 * waited_for + 2 * transformer.num_layers * width * to_do.sample_tokens
    train = config.train
    forwards = 3 + (transformer.recompute_granularity == "full")
    forwards += (train.recompute_old_log_probs or train.updates_per_batch > 1) + (train.kl_coef > 0)
    compute = forwards * forward * to_do.num_trained / (world_size * peak)
    pipeline, pieces = (
        config.parallel.pipeline_model_parallel_size,
        config.parallel.virtual_pipeline_model_parallel_size,
    )
    micro = num_micro_batches(config, world_size, to_do)
    fullest = max(memories, key=lambda memory: memory.total)
    moved = fullest.gradients + fullest.optimizer
    is_shared = config.sglang.colocate and server is not None
    return StepTime(
        play=_play(config, server, num_servers, to_do, active, model_parameters, assumed),
        compute=compute,
        bubble=compute * (pipeline - 1) / (pieces * micro),
        communicate=sum(link.seconds for link in wires if link.name != WEIGHTS),
        optimizer=train.updates_per_batch
        * 2
        * (fullest.optimizer + fullest.gradients)
        / (assumed.memory_tb_per_s * 1e12),
        move=2 * fullest.optimizer / (assumed.host_gb_per_s * GB) if is_shared and moved else 0.0,
        sync=sum(link.seconds for link in wires if link.name == WEIGHTS),
        overlaps=server is not None and config.engine.async_steps > 0,
    )


def _play(
    config: Config,
    server: Server | None,
    num_servers: int,
    to_do: Work,
    active: float,
    model_parameters: int,
    assumed: Assumptions,
) -> float:
    """A decoded token reads the weights once for all requests under way, and the cache of each of these."""
    if server is None or not to_do.num_generated:
        return 0.0
    context = to_do.sample_tokens
    under_way = min(
        config.engine.max_running_requests / num_servers, server.tokens / context, to_do.num_rollouts / num_servers
    )
    if under_way < 1:
        return math.inf
    memory = assumed.memory_tb_per_s * 1e12 * assumed.memory_efficiency
    active_share = min(1.0, active / model_parameters)

    def weights_read(num_requests: float) -> float:
        """Few requests read few experts."""
        return server.weights * (1 - (1 - active_share) ** num_requests)

    read = weights_read(under_way) + under_way * context * server.token
    computed = 2 * active * under_way / (server.num_gpus * assumed.peak_tflops * 1e12 * assumed.mfu)
    tokens_per_s = under_way / max(read / memory, computed)
    # At the end a few long responses are alone, of a mask and then of a prediction.
    longest = 2 * config.engine.max_response_tokens * weights_read(8) / memory
    return max(to_do.num_generated / (tokens_per_s * num_servers), longest)


def host_gib(memories: Sequence[Memory], config: Config, assumed: Assumptions) -> float:
    """Host memory of a node that optimizer state takes, with room to come and go where GPUs are shared."""
    fullest = max(memory.host + (memory.optimizer if config.sglang.colocate else 0) for memory in memories)
    return fullest * assumed.gpus_per_node / GIB
