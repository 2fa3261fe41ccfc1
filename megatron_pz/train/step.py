"""One optimizer update: forward, loss, backward, finite check, clip, update.

1. Every metric is over all ranks, and equal on all of them.
2. A loss or gradient that is not finite stops every rank, before any weight or optimizer state has changed.
3. The gradient norm that is reported is that before clipping.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_pz.config.schema import Config
from megatron_pz.errors import LayoutError, NumericsError
from megatron_pz.platform.base import Platform
from megatron_pz.train.forward import ENTROPIES, LOG_PROBS, DeviceBatch, LogProbs, run_schedule, scored_rows
from megatron_pz.train.loss import importance_weights, logit_pull, policy_loss, supervised_loss, token_sums
from megatron_pz.train.optimizer import LrSchedule, build_optimizer, set_learning_rate
from megatron_pz.train.parallel import Parallel
from megatron_pz.types import MicroBatch, UpdatePlan, UpdateResult

SUPERVISED_TASKS = ("continue_pt", "sft")
SUMS = (
    *("loss", "tokens", "packed", "tokens_mask", "entropy_mask", "entropy_prediction"),
    *("loss_mask", "loss_prediction", "pull_mask", "pull_prediction"),
    *("ratio", "clipped", "importance_clipped", "replayed", "mismatch_k3", "ref_kl", "broken"),
)
"""What micro-batches add to a step's metrics, see `train.loss`; `broken` counts those whose loss is not finite."""


class Trainer:
    """The policy and its optimizer.

    Args:
        chunks: from `train.model.build_model`, weights loaded: the optimizer copies them now.
        config: sections task, engine, train, model, parallel and the table `[optimizer]` are read.
        platform: installed.
        parallel: this rank's place.

    Raises:
        LayoutError: Megatron would sample under this layout, but refuses to train.
    """

    def __init__(
        self, chunks: list[DistributedDataParallel], config: Config, platform: Platform, parallel: Parallel
    ) -> None:
        self.chunks, self.config, self.platform, self.parallel = chunks, config, platform, parallel
        transformer = chunks[0].config
        if transformer.num_moe_experts and parallel.tp_size > 1 and not transformer.sequence_parallel:
            raise LayoutError(
                f"parallel.tensor_model_parallel_size is {parallel.tp_size} and sequence_parallel false, in a model with experts; "
                "Megatron trains these under tensor parallelism only with parallel.sequence_parallel. Set it to true."
            )
        self.optimizer = build_optimizer(chunks, config)
        self.schedule = LrSchedule.of(config.train)
        self.is_supervised = config.task.task in SUPERVISED_TASKS
        # Text is learned as it is; what was sampled is scored under the temperature it was sampled with (greedy: 1).
        self.temperature = 1.0 if self.is_supervised else config.engine.temperature or 1.0

    def lr_at(self, step: int) -> float:
        """Learning rate of update `step`, counted from 1."""
        return self.schedule.at(step)

    def sleep(self) -> None:
        """Free the gradient buffers and move the optimizer's state to host memory; only the weights stay on the device."""
        for chunk in self.chunks:
            chunk.offload_grad_buffers()
        self.optimizer.offload_to_cpu()

    def wake(self) -> None:
        """Undo `sleep`; gradients are zero."""
        for chunk in self.chunks:
            chunk.restore_grad_buffers()
        self.optimizer.restore_from_cpu()

    def step(
        self,
        plan: UpdatePlan,
        *,
        lr_step: int,
        old_log_probs: LogProbs | None = None,
        ref_log_probs: LogProbs | None = None,
    ) -> UpdateResult:
        """Update the weights once. Collective: every rank calls it with its own view of one plan.

        Args:
            plan: micro-batches of this rank's `dp_rank` are used, and the counts.
            lr_step: the step whose learning rate is taken, from 1.
            old_log_probs: from `score`, the ratio's denominator; None: the engine's log-probs, or with
                `train.importance_sampling` this update's own, without gradient. These are the same as from `score` where
                it is the first update on the plan's samples: no weight has changed in between.
            ref_log_probs: under the reference policy, where there is a KL term.

        Returns:
            Metrics by their names in `report.metrics`; those that have nothing to speak of are left out. A plan without
            a trained token is not applied.

        Raises:
            NumericsError: on every rank, with the numbers; weights and optimizer are as before.
        """
        lr = self.lr_at(lr_step)
        if plan.num_tokens == 0:
            return UpdateResult(applied=False, loss=0.0, grad_norm=0.0, lr=lr)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        set_learning_rate(self.optimizer, lr, self.config.train.weight_decay)
        collected = run_schedule(
            self.chunks,
            plan.micro_batches[self.parallel.dp_rank],
            self.objective,
            self.platform,
            temperature=self.temperature,
            old_log_probs=old_log_probs,
            ref_log_probs=ref_log_probs,
        )
        sums, max_mismatch = self._reduced(collected)
        assert sums["tokens"] == plan.num_tokens, (
            f"{sums['tokens']} tokens were trained, the plan has {plan.num_tokens}"
        )
        # Done once more inside optimizer.step(), which would go on to write the weights.
        overflowed = self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        loss = sums["loss"] / plan.num_tokens
        self._check_finite(loss, grad_norm, overflowed, sums, max_mismatch)
        self.optimizer.step()
        metrics = self._metrics(sums, max_mismatch) | {"loss": loss, "grad_norm": grad_norm, "lr": lr}
        return UpdateResult(applied=True, loss=loss, grad_norm=grad_norm, lr=lr, metrics=metrics)

    @torch.no_grad()
    def score(self, micro_batches: Sequence[MicroBatch], *, replays_routing: bool = True) -> list[np.ndarray]:
        """Log-probs of the trained tokens under the present weights: float32 [T] a micro-batch, 0 elsewhere.

        Collective, as `step`; ranks of one pipeline all have the result.

        Args:
            micro_batches: of this rank's `dp_rank`.
            replays_routing: under `train.routing_replay`, on the experts that the micro-batches name, as `step`.
        """
        return self._forward(micro_batches, LOG_PROBS, replays_routing)

    @torch.no_grad()
    def entropies(self, micro_batches: Sequence[MicroBatch]) -> list[np.ndarray]:
        """Entropies of the distributions that trained tokens are drawn from, in nats: float32 [T] each, as `score`; routers choose."""
        return self._forward(micro_batches, ENTROPIES, replays_routing=False)

    def _forward(self, micro_batches: Sequence[MicroBatch], row: int, replays_routing: bool) -> list[np.ndarray]:
        """A row of the model's output for each micro-batch."""
        return scored_rows(
            self.chunks,
            micro_batches,
            row,
            self.platform,
            temperature=self.temperature,
            replays_routing=replays_routing,
        )

    def objective(self, batch: DeviceBatch, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(summed loss, trained tokens, statistics) of this rank's tokens of a micro-batch; `output` is float32 [2, T]."""
        log_probs, entropy = output
        before = log_probs.detach() if batch.old_log_probs is None else batch.old_log_probs
        if self.is_supervised:
            loss, stats = supervised_loss(log_probs, batch.weights)
            rollout_log_probs = None
        else:
            loss, stats = self._policy_loss(batch, log_probs, before)
            rollout_log_probs = batch.rollout_log_probs
        stats |= token_sums(before, rollout_log_probs, entropy, batch.weights, batch.is_generator)
        value = loss.detach().double()
        stats |= {"loss": value, "broken": (~torch.isfinite(value)).double()}
        stats["replayed"] = (batch.is_replayed & (batch.weights > 0)).sum().double()
        return loss, _count(batch.weights), stats

    def _policy_loss(self, batch: DeviceBatch, log_probs: Tensor, before: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """`policy_loss` of a micro-batch; `before`: float32 [T], log-probs of the trainer before the update."""
        train = self.config.train
        importance: Tensor | None = None
        importance_stats: dict[str, Tensor] = {}
        old = batch.rollout_log_probs if batch.old_log_probs is None else batch.old_log_probs
        if train.importance_sampling != "off":
            old = before
            importance, importance_stats = importance_weights(
                before,
                batch.rollout_log_probs,
                batch.weights,
                mode=train.importance_sampling,
                cap=train.importance_cap,
            )
        loss, stats = policy_loss(
            log_probs,
            old,
            batch.advantages,
            batch.weights,
            eps_clip=train.eps_clip,
            eps_clip_high=train.eps_clip_high,
            dual_clip=train.dual_clip,
            importance=importance,
            ref_log_probs=batch.ref_log_probs,
            kl_coef=train.kl_coef,
            is_generator=batch.is_generator,
        )
        return loss, stats | importance_stats | logit_pull(loss, log_probs, batch.weights, batch.is_generator)

    def _reduced(self, collected: Sequence[Mapping[str, Tensor]]) -> tuple[dict[str, float], float]:
        """`SUMS` over all micro-batches and ranks, and the largest mismatch."""
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=self.parallel.device)
        largest = torch.zeros(1, dtype=torch.float64, device=self.parallel.device)
        counts = self.parallel.is_last_stage and self.parallel.tp_rank == 0  # ranks beside it hold the same tokens
        for stats in collected if counts else ():
            sums += torch.stack([stats.get(name, largest.new_zeros(())) for name in SUMS])
            largest = torch.maximum(largest, stats.get("max_mismatch", largest.new_zeros(())))
        dist.all_reduce(sums)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return dict(zip(SUMS, sums.tolist(), strict=True)), largest.item()

    def _check_finite(
        self, loss: float, grad_norm: float, overflowed: bool, sums: Mapping[str, float], max_mismatch: float
    ) -> None:
        is_bad = overflowed or not (math.isfinite(loss) and math.isfinite(grad_norm))
        verdict = torch.tensor([float(is_bad)], device=self.parallel.device)
        dist.all_reduce(verdict, dist.ReduceOp.MAX)  # no rank may write its weights while another stops
        if verdict.item() > 0:
            raise NumericsError(
                f"loss is {loss:g} and the gradient's norm {grad_norm:g}; both must be finite. Micro-batches of all "
                f"ranks whose loss is not finite: {int(sums['broken'])}. Tokens trained on: {int(sums['tokens'])}. Largest "
                f"difference of a log-prob to the engine's: {max_mismatch:g}. "
                "No weight was changed."
            )

    def _metrics(self, sums: Mapping[str, float], max_mismatch: float) -> dict[str, float]:
        tokens, of_masks = sums["tokens"], sums["tokens_mask"]
        metrics = {"tokens/trained": tokens, "tokens/packed": sums["packed"]}
        if self.is_supervised:
            return metrics | {"entropy": (sums["entropy_mask"] + sums["entropy_prediction"]) / tokens}
        if of_masks:
            metrics["entropy/mask"] = sums["entropy_mask"] / of_masks
            metrics["loss/mask"] = sums["loss_mask"] / tokens
        if tokens > of_masks:
            metrics["entropy/prediction"] = sums["entropy_prediction"] / (tokens - of_masks)
            metrics["loss/prediction"] = sums["loss_prediction"] / tokens
        if 0 < of_masks < tokens and (pull := sums["pull_mask"] + sums["pull_prediction"]):
            metrics["grad_share/mask"] = sums["pull_mask"] / pull
        if self.config.train.kl_coef > 0:
            metrics["ref_kl"] = sums["ref_kl"] / tokens
        if self.config.train.importance_sampling != "off":
            metrics["mismatch/clipped_share"] = sums["importance_clipped"] / tokens
        if self.config.train.routing_replay:
            metrics["mismatch/replayed_share"] = sums["replayed"] / tokens
        return metrics | {
            "token_share/mask": of_masks / tokens,
            "mismatch_kl": sums["mismatch_k3"] / tokens,
            "mismatch/max_abs": max_mismatch,
            "clip_fraction": sums["clipped"] / tokens,
            "ratio/mean": sums["ratio"] / tokens,
        }


def _count(weights: Tensor) -> Tensor:
    return (weights > 0).sum().int()
