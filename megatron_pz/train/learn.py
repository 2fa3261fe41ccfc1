"""What one step's samples do to the weights: old and reference log-probs where they are wanted, then the updates.

A loss or gradient that is not finite leaves the weights as they were, and leaves behind a dump with which
`tools/replay_step.py` repeats the refused update.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_pz.config.load import to_toml
from megatron_pz.config.schema import TrainConfig
from megatron_pz.errors import DiskError, NumericsError
from megatron_pz.models.shards import unwrap
from megatron_pz.report.timers import Timers
from megatron_pz.train.dump import Dump, Weights, write_dump
from megatron_pz.train.forward import LogProbs
from megatron_pz.train.step import Trainer
from megatron_pz.types import MicroBatch, UpdatePlan, UpdateResult


class Learner:
    """Applies the updates of a step.

    Args:
        trainer: the policy and its optimizer.
        config: the `[train]` section.
        dump_dir: where a refused update is written.
        rank: of this process.
        timers: get the seconds of old and reference log-probs, as `score`.
    """

    def __init__(
        self, trainer: Trainer, config: TrainConfig, dump_dir: Path, rank: int, timers: Timers | None = None
    ) -> None:
        self.trainer, self.config, self.dump_dir, self.rank = trainer, config, dump_dir, rank
        self.is_mid_step = False  # some updates of a step were applied, and a later one of it was refused
        self._timers = timers or Timers()
        self._reference = self._weights() if config.kl_coef > 0 else None

    def learn(self, plans: Sequence[UpdatePlan], step: int) -> UpdateResult:
        """Result of the step's updates; metrics are means over them.

        Raises:
            NumericsError: with the path of the dump; weights and optimizer are as before the refused update.
        """
        if not plans:
            return UpdateResult(applied=False, loss=0.0, grad_norm=0.0, lr=self.trainer.lr_at(step), metrics={})
        # The first update needs no score for importance sampling: its own forward has the weights that would be scored.
        rescored = len(plans) > 1 or self.config.recompute_old_log_probs
        old = [self._score(plan) if rescored else None for plan in plans]
        ref = [self._score_reference(plan) if self._reference is not None else None for plan in plans]
        results: list[UpdateResult] = []
        for plan, old_log_probs, ref_log_probs in zip(plans, old, ref, strict=True):
            try:
                results.append(
                    self.trainer.step(plan, lr_step=step, old_log_probs=old_log_probs, ref_log_probs=ref_log_probs)
                )
            except NumericsError as error:
                self.is_mid_step = any(result.applied for result in results)
                place = f"step {step}" + (f", update {len(results) + 1} of {len(plans)}" if len(plans) > 1 else "")
                told = self._dumped(str(error), plan, step, old_log_probs, ref_log_probs)
                raise NumericsError(
                    f"{place}: {error} The update was refused. {told} Lower --lr, or mend the weights or the text that "
                    "it names, and start again: the run goes on from its last checkpoint, or from the one before if that "
                    "is moved away."
                ) from error
        return _mean(results)

    def _mine(self, plan: UpdatePlan) -> tuple[MicroBatch, ...]:
        return plan.micro_batches[self.trainer.parallel.dp_rank]

    def _score(self, plan: UpdatePlan, *, replays_routing: bool = True) -> list[np.ndarray]:
        with self._timers("score"):
            return self.trainer.score(self._mine(plan), replays_routing=replays_routing)

    def _weights(self) -> Weights:
        return [
            {name: parameter.detach().clone() for name, parameter in chunk.named_parameters()}
            for chunk in self.trainer.chunks
        ]

    def _score_reference(self, plan: UpdatePlan) -> list[np.ndarray]:
        """Log-probs under the initial policy, whose weights stand in for the policy's while they are taken.

        It routes by itself: the server's choice is that of other weights.
        """
        assert self._reference is not None
        current = self._weights()
        try:
            self._put(self._reference)
            return self._score(plan, replays_routing=False)
        finally:
            self._put(current)

    @torch.no_grad()
    def _put(self, weights: Weights) -> None:
        for chunk, values in zip(self.trainer.chunks, weights, strict=True):
            for name, parameter in chunk.named_parameters():
                parameter.copy_(values[name])

    def _dumped(self, error: str, plan: UpdatePlan, step: int, old: LogProbs | None, ref: LogProbs | None) -> str:
        """Write the refused update down; a sentence on where it is, or why it is not."""
        dump = Dump(
            step=step,
            rank=self.rank,
            world_size=self.trainer.parallel.world_size,
            error=error,
            settings=to_toml(self.trainer.config),
            hf_config=dict(unwrap(self.trainer.chunks[0]).hf_config),
            plan=plan,
            old_log_probs=None if old is None else list(old),
            ref_log_probs=None if ref is None else list(ref),
            weights=self._weights(),
        )
        try:
            path = write_dump(dump, self.dump_dir)
        except DiskError as fault:
            return f"It could not be dumped: {fault}"
        return f"To see which tokens are to blame, repeat it: python tools/replay_step.py {path}."


def _mean(results: Sequence[UpdateResult]) -> UpdateResult:
    """Means over the updates that were applied; a metric that only some of them have, over those."""
    applied = [result for result in results if result.applied]
    if len(applied) < 2:
        return (applied or list(results))[0]
    found: dict[str, list[float]] = {}
    for result in applied:
        for name, value in result.metrics.items():
            found.setdefault(name, []).append(value)
    metrics = {name: float(np.mean(values)) for name, values in found.items()}
    return UpdateResult(
        applied=True,
        loss=metrics["loss"],
        grad_norm=metrics["grad_norm"],
        lr=applied[-1].lr,
        metrics=metrics,
    )
