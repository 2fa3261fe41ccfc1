"""Micro-batches through Megatron's pipeline schedule, forward alone or with the backward.

T packed tokens of a micro-batch, of which each context-parallel rank has its share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_pz.batch.context import gathered_places, places, share, whole
from megatron_pz.models.routing_replay import UNKNOWN, RoutingReplay
from megatron_pz.models.shards import unwrap
from megatron_pz.platform.base import Platform
from megatron_pz.train.interleaving import interleaved
from megatron_pz.types import MicroBatch

LogProbs = Sequence[np.ndarray]
"""float32 [T] for each micro-batch of a rank, whole rows; 0 where nothing is trained."""

LOG_PROBS, ENTROPIES = 0, 1
"""Rows of the model's output."""


@dataclass(frozen=True, eq=False)
class DeviceBatch:
    """A `MicroBatch` on the device, as the model and the objective take it; T tokens of this rank."""

    input_ids: Tensor  # int64 [1, T]
    position_ids: Tensor  # int64 [1, T]
    packed_seq_params: PackedSeqParams
    labels: Tensor  # int64 [1, T], -1 where nothing is trained: the model leaves these out
    wanted: Tensor  # int64 [n], the other places: found on the host, which would wait for the device to tell them
    weights: Tensor  # float32 [T]
    advantages: Tensor  # float32 [T]
    rollout_log_probs: Tensor  # float32 [T]
    is_generator: Tensor  # bool [T]
    old_log_probs: Tensor | None  # float32 [T], of the trainer before the update
    ref_log_probs: Tensor | None  # float32 [T], of the reference policy
    routed_experts: Tensor | None  # int16 [T, layers of this stage with experts, k]; None: routers choose
    is_replayed: Tensor  # bool [T], whether the token at the position goes where the engine sent it


Objective = Callable[[DeviceBatch, Tensor], tuple[Tensor, Tensor, Any]]
"""(batch, [2, T] of log-probs and entropies) -> (summed loss, int32 count of tokens, anything to be collected)."""


def on_device(
    batch: MicroBatch,
    platform: Platform,
    old: np.ndarray | None = None,
    ref: np.ndarray | None = None,
    replay: RoutingReplay | None = None,
    context: tuple[int, int] = (1, 0),
) -> DeviceBatch:
    """This rank's share of the micro-batch on the platform's device; its routed experts too, where there is a `replay`.

    Args:
        old: float32 [T] of the whole row, as `ref`.
        context: number of context-parallel ranks, and this one's place among them.

    Raises:
        EngineError: routed experts are not those of this model.
    """
    size, _ = context
    shared: dict[str, np.ndarray] = {}
    if size > 1:
        mine = places(batch.cu_seqlens, *context)
        old, ref = (None if values is None else values[mine] for values in (old, ref))
        batch = share(batch, *context)
        shared = {"positions": batch.position_ids, "gathered_places": gathered_places(batch.cu_seqlens, size)}
    experts = None if replay is None else batch.routed_experts
    of_stage = None if replay is None or experts is None else replay.of_stage(experts)

    tensor = platform.to_device
    is_trained = batch.loss_weights > 0
    return DeviceBatch(
        input_ids=tensor(batch.token_ids)[None],
        position_ids=tensor(batch.position_ids)[None],
        packed_seq_params=platform.packed_seq_params(batch.cu_seqlens, **shared),
        labels=tensor(np.where(is_trained, batch.labels, -1))[None],
        wanted=tensor(np.flatnonzero(is_trained & (batch.labels >= 0))),
        weights=tensor(batch.loss_weights),
        advantages=tensor(batch.advantages),
        rollout_log_probs=tensor(batch.rollout_log_probs),
        is_generator=tensor(batch.is_generator),
        old_log_probs=None if old is None else tensor(old),
        ref_log_probs=None if ref is None else tensor(ref),
        routed_experts=None if of_stage is None else tensor(of_stage),
        is_replayed=tensor(np.zeros(batch.num_tokens, np.bool_) if experts is None else experts[:, 0, 0] != UNKNOWN),
    )


def run_schedule(
    chunks: Sequence[DistributedDataParallel],
    micro_batches: Sequence[MicroBatch],
    objective: Objective,
    platform: Platform,
    *,
    temperature: float,
    old_log_probs: LogProbs | None = None,
    ref_log_probs: LogProbs | None = None,
    forward_only: bool = False,
    replays_routing: bool = True,
) -> list[Any]:
    """Send the micro-batches of this rank through its pipeline; gradients are finished when it returns.

    Collective: every rank calls it with equally many micro-batches; ranks of one pipeline, and context-parallel ranks,
    with the same ones, whole.

    Args:
        chunks: of this rank; several are run in turns, and micro-batches are then a multiple of the pipeline's ranks.
        micro_batches: at least one.
        objective: called on the last stage, once a micro-batch.
        temperature: of the log-probs.
        old_log_probs: handed on to the objective.
        ref_log_probs: handed on to the objective.
        forward_only: no backward; gradients are left as they are.
        replays_routing: tokens go to the experts that the micro-batches name, if the model was built for it.

    Returns:
        What the objective gave to be collected, in the order of the micro-batches; on the last stage only.
    """
    context = (parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank())

    def batches(chunk: torch.nn.Module) -> Iterator[DeviceBatch]:
        replay = unwrap(chunk).routing_replay if replays_routing else None
        if replay is not None:
            replay.forget()
        for place, batch in enumerate(micro_batches):
            yield on_device(
                batch,
                platform,
                None if old_log_probs is None else old_log_probs[place],
                None if ref_log_probs is None else ref_log_probs[place],
                replay,
                context,
            )

    def forward_step(data: Iterator[DeviceBatch], model: torch.nn.Module) -> tuple[Tensor, Any]:
        batch = next(data)
        output = model(
            batch.input_ids,
            batch.position_ids,
            packed_seq_params=batch.packed_seq_params,
            labels=batch.labels,
            wanted=batch.wanted,
            temperature=temperature,
            routed_experts=batch.routed_experts,
        )
        return output, partial(objective, batch)

    lengths = [batch.num_tokens for batch in micro_batches]
    collected: list[Any] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[batches(chunk) for chunk in chunks] if len(chunks) > 1 else batches(chunks[0]),
        model=list(chunks),
        num_microbatches=len(micro_batches),
        seq_length=lengths[0],  # of no account: stages tell each other each micro-batch's own length
        micro_batch_size=1,
        forward_only=forward_only,
        **(interleaved(chunks[0].config, lengths, platform.device) if len(chunks) > 1 else {}),
    )
    for chunk in chunks:
        unwrap(chunk).decoder.set_input_tensor(
            None
        )  # else the last micro-batch's, and its gradient, stay till the next
    return collected


@torch.no_grad()
def scored_rows(
    chunks: Sequence[DistributedDataParallel],
    micro_batches: Sequence[MicroBatch],
    row: int,
    platform: Platform,
    *,
    temperature: float,
    replays_routing: bool,
) -> list[np.ndarray]:
    """A row of the model's output, `LOG_PROBS` or `ENTROPIES`, of the trained tokens: float32 [T] a micro-batch, 0 elsewhere.

    Collective as `run_schedule`; the result is on every rank of a pipeline.
    """

    def keep(batch: DeviceBatch, output: Tensor) -> tuple[Tensor, Tensor, np.ndarray]:
        return output.sum(), (batch.weights > 0).sum().int(), output[row].cpu().numpy()

    if not micro_batches:
        return []
    for chunk in chunks:
        chunk.eval()
    try:
        scored = run_schedule(
            chunks,
            micro_batches,
            keep,
            platform,
            temperature=temperature,
            forward_only=True,
            replays_routing=replays_routing,
        )
    finally:
        for chunk in chunks:
            chunk.train()
    scored = whole_rows(scored, micro_batches)
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        box = [scored]
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast_object_list(box, last, parallel_state.get_pipeline_model_parallel_group())
        scored = box[0]
    return scored


def whole_rows(shares: Sequence[np.ndarray], micro_batches: Sequence[MicroBatch]) -> list[np.ndarray]:
    """Values of every micro-batch's tokens, [T] each in their dtype, from those that the objective gave of this rank's share of them.

    Collective over context-parallel ranks; stages before the last, which have none, are given and get none.
    """
    size = parallel_state.get_context_parallel_world_size()
    if size == 1 or not shares:
        return list(shares)
    everywhere: list[Any] = [None] * size
    dist.all_gather_object(everywhere, list(shares), group=parallel_state.get_context_parallel_group())
    return [whole(parts, batch.cu_seqlens) for *parts, batch in zip(*everywhere, micro_batches, strict=True)]
