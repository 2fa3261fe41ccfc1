"""Rounds: paragraphs in, groups and trainable samples out, as many rounds ahead of the update as the engine may be.

The game runs on rank 0; while it runs, the other ranks help to answer (`engine.finish`). What comes back is complete on
rank 0 and None elsewhere.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from megatron_pz.batch.samples import to_samples
from megatron_pz.config.schema import TaskConfig
from megatron_pz.corpus.cursor import Cursor
from megatron_pz.engine.base import Conversation, Engine
from megatron_pz.tasks.base import Task, TextTask
from megatron_pz.train.state import RunState
from megatron_pz.types import Generate, Group, Paragraph, Rollout, Sample


@dataclass(frozen=True)
class Corpus:
    """Paragraphs in a seeded order that any position can be asked for."""

    paragraphs: Sequence[Paragraph]
    cursor: Cursor

    def take(self, position: int, n: int) -> list[Paragraph]:
        """The `n` paragraphs from `position` on, counted in draws since the run began."""
        return [self.paragraphs[index] for index in self.cursor.take(position, n)]

    def epoch(self, position: int) -> float:
        """Passes over the corpus that are done at `position`."""
        return position / len(self.paragraphs)


@dataclass(frozen=True)
class Round:
    """All play of one step."""

    groups: Sequence[Group]  # of both roles, dropped ones included; empty for supervised text
    samples: Sequence[Sample]  # what the update may learn from
    metrics: Mapping[str, float] = field(default_factory=dict)


class Begun(Protocol):
    """A round that may be under way."""

    def finish(self) -> Round | None:
        """The round, on rank 0, once it is over; None on the other ranks."""
        ...


class Player(Protocol):
    def begin(self, step: int, paragraphs: Sequence[Paragraph]) -> Begun:
        """Begin the round of `step`. All ranks, in the order of the steps."""
        ...


class Rounds:
    """Hands out the rounds in order, and has those of the next steps under way while one is learned from.

    Args:
        ahead: rounds that may be under way beyond the one that is learned from (`engine.async_steps`).
        last: step of the last round.
    """

    def __init__(self, corpus: Corpus, player: Player, per_step: int, ahead: int, last: int) -> None:
        self.corpus, self.player, self.per_step, self.ahead, self.last = corpus, player, per_step, ahead, last
        self._under_way: deque[Begun] = deque()
        self._begun = 0  # step of the round that was begun last

    def next(self, state: RunState) -> Round | None:
        """The round of the step after `state`; those ahead of it begin when it is over."""
        step = state.step + 1
        self._begin_until(step, state)
        played = self._under_way.popleft().finish()
        self._begin_until(min(step + self.ahead, self.last), state)
        return played

    def _begin_until(self, last: int, state: RunState) -> None:
        for step in range(max(self._begun, state.step) + 1, last + 1):
            position = state.position + (step - state.step - 1) * self.per_step
            self._under_way.append(self.player.begin(step, self.corpus.take(position, self.per_step)))
            self._begun = step


class GamePlayer:
    """Plays a task that generates.

    Args:
        keep: what is put between the game and the engine in the round of a step, e.g. a journal of completions.
    """

    def __init__(
        self,
        task: Task,
        engine: Engine,
        seed: int,
        config: TaskConfig,
        keep: Callable[[Generate, int], Generate] | None = None,
    ) -> None:
        self.task, self.engine, self.seed, self.config = task, engine, seed, config
        self.keep = keep or (lambda generate, step: generate)

    def begin(self, step: int, paragraphs: Sequence[Paragraph]) -> Begun:
        generate = self.keep(self.engine.generate, step)
        begun = self.engine.begin(lambda: self.task.play(paragraphs, generate, (self.seed, step)))
        return BegunGame(self, step, begun)


@dataclass(frozen=True)
class BegunGame:
    """A round of a game."""

    player: GamePlayer
    step: int
    begun: Conversation[list[Rollout]]

    def finish(self) -> Round | None:
        rollouts = self.player.engine.finish(self.begun)
        if rollouts is None:
            return None
        task, config = self.player.task, self.player.config
        groups = task.groups(rollouts, self.step)
        samples = to_samples(
            groups,
            generator_weight=config.generator_weight,
            predictor_weight=config.predictor_weight,
        )
        staleness = _staleness(groups, self.player.engine.version)
        return Round(groups, samples, {**task.health(groups), **staleness})


@dataclass(frozen=True)
class TextPlayer:
    """Hands out supervised text: nothing is generated."""

    task: TextTask
    is_rank0: bool
    seed: int

    def begin(self, step: int, paragraphs: Sequence[Paragraph]) -> Begun:
        return BegunText(self, step, paragraphs)


@dataclass(frozen=True)
class BegunText:
    """A round of supervised text."""

    player: TextPlayer
    step: int
    paragraphs: Sequence[Paragraph]

    def finish(self) -> Round | None:
        if not self.player.is_rank0:
            return None
        return Round((), self.player.task.samples(self.paragraphs, (self.player.seed, self.step)))


def _staleness(groups: Sequence[Group], version: int) -> dict[str, float]:
    """How many updates the sampled tokens are behind the policy `version` that learns from them."""
    behind = [
        version - sampled_by
        for group in groups
        for rollout in group.rollouts
        for sampled_by in rollout.completion.weight_versions
    ]
    return {"staleness/mean": sum(behind) / len(behind), "staleness/max": float(max(behind))} if behind else {}
