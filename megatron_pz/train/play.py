"""One round: paragraphs in, groups and trainable samples out.

The game runs on rank 0; while it runs, the other ranks decode for it (`engine.follow`). What comes back is complete on
rank 0 and None elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from megatron_pz.batch.samples import to_samples
from megatron_pz.config.schema import TaskConfig
from megatron_pz.engine.base import Engine
from megatron_pz.tasks.base import Task, TextTask
from megatron_pz.types import Group, Paragraph, Sample

T = TypeVar("T")


@dataclass(frozen=True)
class Round:
    """All play of one step."""

    groups: Sequence[Group]  # of both roles, dropped ones included; empty for supervised text
    samples: Sequence[Sample]  # what the update may learn from
    metrics: Mapping[str, float] = field(default_factory=dict)


class Player(Protocol):
    def play(self, step: int, paragraphs: Sequence[Paragraph]) -> Round | None:
        """The round of `step`, on rank 0; None on the other ranks."""
        ...


def converse(engine: Engine, is_rank0: bool, conversation: Callable[[], Awaitable[T]]) -> T | None:
    """Result of `conversation()` on rank 0, whose requests every rank helps to answer; None on the other ranks."""
    if not is_rank0:
        engine.follow()
        return None

    async def run() -> T:
        return await conversation()

    try:
        return asyncio.run(run())
    finally:
        engine.release_followers()


class GamePlayer:
    """Plays a task that generates."""

    def __init__(self, task: Task, engine: Engine, is_rank0: bool, seed: int, config: TaskConfig) -> None:
        self.task, self.engine, self.is_rank0, self.seed, self.config = task, engine, is_rank0, seed, config

    def play(self, step: int, paragraphs: Sequence[Paragraph]) -> Round | None:
        rollouts = converse(
            self.engine, self.is_rank0, lambda: self.task.play(paragraphs, self.engine.generate, (self.seed, step))
        )
        if rollouts is None:
            return None
        groups = self.task.groups(rollouts, step)
        samples = to_samples(
            groups,
            generator_weight=self.config.generator_weight,
            predictor_weight=self.config.predictor_weight,
        )
        return Round(groups, samples, self.task.health(groups))


class TextPlayer:
    """Hands out supervised text: nothing is generated."""

    def __init__(self, task: TextTask, is_rank0: bool, seed: int) -> None:
        self.task, self.is_rank0, self.seed = task, is_rank0, seed

    def play(self, step: int, paragraphs: Sequence[Paragraph]) -> Round | None:
        if not self.is_rank0:
            return None
        return Round((), self.task.samples(paragraphs, (self.seed, step)))
