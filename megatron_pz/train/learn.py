"""What one step's samples do to the weights: old and reference log-probs where they are wanted, then the updates.

A loss or gradient that is not finite leaves the weights as they were, and leaves behind a dump with which
`tools/replay_step.py` repeats the refused update.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_pz.config.schema import TrainConfig
from megatron_pz.errors import NumericsError
from megatron_pz.train.step import Trainer
from megatron_pz.types import MicroBatch, UpdatePlan, UpdateResult


class Learner:
    """Applies the updates of a step.

    Args:
        trainer: the policy and its optimizer.
        config: the `[train]` section.
        dump_dir: where a refused update is written.
        save_state: writes a checkpoint of the untouched state beside the dump.
    """

    def __init__(self, trainer: Trainer, config: TrainConfig, dump_dir: Path, rank: int) -> None:
        self.trainer, self.config, self.dump_dir, self.rank = trainer, config, dump_dir, rank
        self._reference = self._weights() if config.kl_coef > 0 else None

    def learn(self, plans: Sequence[UpdatePlan], step: int) -> UpdateResult:
        """Result of the step's updates; metrics are means over them.

        Raises:
            NumericsError: with the path of the dump; weights and optimizer are as before the refused update.
        """
        if not plans:
            return UpdateResult(applied=False, loss=0.0, grad_norm=0.0, lr=self.trainer.lr_at(step), metrics={})
        rescored = len(plans) > 1 or self.config.recompute_old_log_probs
        old = [self.trainer.score(self._mine(plan)) if rescored else None for plan in plans]
        ref = [self._score_reference(plan) if self._reference is not None else None for plan in plans]
        results = []
        for plan, old_log_probs, ref_log_probs in zip(plans, old, ref, strict=True):
            try:
                results.append(
                    self.trainer.step(plan, lr_step=step, old_log_probs=old_log_probs, ref_log_probs=ref_log_probs)
                )
            except NumericsError as error:
                path = self._dump(plan, step, old_log_probs, ref_log_probs)
                raise NumericsError(f"step {step}: {error} The update was refused and dumped to {path}.") from error
        return _mean(results)

    def _mine(self, plan: UpdatePlan) -> tuple[MicroBatch, ...]:
        return plan.micro_batches[self.trainer.parallel.dp_rank]

    def _weights(self) -> list[dict[str, torch.Tensor]]:
        return [
            {name: parameter.detach().clone() for name, parameter in chunk.named_parameters()}
            for chunk in self.trainer.chunks
        ]

    def _score_reference(self, plan: UpdatePlan) -> list[np.ndarray]:
        """Log-probs under the initial policy, whose weights stand in for the policy's while they are taken."""
        assert self._reference is not None
        current = self._weights()
        try:
            self._put(self._reference)
            return self.trainer.score(self._mine(plan))
        finally:
            self._put(current)

    @torch.no_grad()
    def _put(self, weights: list[dict[str, torch.Tensor]]) -> None:
        for chunk, values in zip(self.trainer.chunks, weights, strict=True):
            for name, parameter in chunk.named_parameters():
                parameter.copy_(values[name])

    def _dump(self, plan: UpdatePlan, step: int, old: object, ref: object) -> Path:
        self.dump_dir.mkdir(parents=True, exist_ok=True)
        path = self.dump_dir / f"step_{step:06d}-rank{self.rank}.pt"
        partial = path.with_suffix(".tmp")
        record = {
            "step": step,
            "plan": pickle.dumps(plan),
            "old_log_probs": old,
            "ref_log_probs": ref,
            "weights": self._weights(),
        }
        torch.save(record, partial)
        partial.rename(path)
        return path


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
