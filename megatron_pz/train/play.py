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
from megatron_pz.tasks.stragglers import Place, Played, Stragglers
from megatron_pz.train.state import RunState
from megatron_pz.types import Generate, Group, Paragraph, Sample


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
    left: Sequence[Place] = ()  # paragraphs that go on in the next round


class Begun(Protocol):
    """A round that may be under way."""

    def finish(self) -> Round | None:
        """The round, on rank 0, once it is over; None on the other ranks."""
        ...


class Player(Protocol):
    """Turns paragraphs into a round."""

    def begin(self, step: int, paragraphs: Sequence[Paragraph], version: int) -> Begun:
        """Begin the round of `step`. All ranks, in the order of the steps.

        Args:
            version: of the policy that samples when it begins.
        """
        ...

    def resume(self, left: Sequence[tuple[Place, Paragraph]]) -> None:
        """Have paragraphs that a checkpoint's round left begun again by the next one."""
        ...


class Rounds:
    """Hands out the rounds in order, and has those of the next steps under way while one is learned from.

    Args:
        num_begun: paragraphs that the round of a step begins.
        ahead: rounds that may be under way beyond the one that is learned from (`engine.async_steps`).
        last: step of the last round.
        start: where the run goes on.
    """

    def __init__(
        self,
        corpus: Corpus,
        player: Player,
        num_begun: Callable[[int], int],
        ahead: int,
        last: int,
        start: RunState,
    ) -> None:
        self.corpus, self.player, self.num_begun, self.ahead, self.last = corpus, player, num_begun, ahead, last
        self._under_way: deque[Begun] = deque()
        self._begun = start.step  # step of the round that was begun last
        player.resume([(place, self._paragraph(place, start)) for place in start.left])

    def next(self, state: RunState) -> Round | None:
        """The round of the step after `state`; those ahead of it begin when it is over."""
        step = state.step + 1
        self._begin_until(step, state)
        played = self._under_way.popleft().finish()
        self._begin_until(min(step + self.ahead, self.last), state)
        return played

    def _begin_until(self, last: int, state: RunState) -> None:
        for step in range(self._begun + 1, last + 1):
            paragraphs = self.corpus.take(self._position(step, state), self.num_begun(step))
            self._under_way.append(self.player.begin(step, paragraphs, state.policy_version))
            self._begun = step

    def _position(self, step: int, state: RunState) -> int:
        """Of the first paragraph that the round of `step` begins."""
        after = sum(self.num_begun(between) for between in range(state.step + 1, step))
        before = sum(self.num_begun(between) for between in range(step, state.step + 1))
        return state.position + after - before

    def _paragraph(self, place: Place, state: RunState) -> Paragraph:
        step, index = place
        return self.corpus.take(self._position(step, state) + index, 1)[0]


class Keep(Protocol):
    """Puts a record between the game and the engine."""

    def __call__(self, generate: Generate, step: int, version: int) -> Generate:
        """`generate` with a record of completions in front of it; `version` as in `Player.begin`."""
        ...


class GamePlayer:
    """Plays a task that generates.

    Args:
        rounds: decides which paragraphs a round ends with.
        keep: what is put between the game and the engine in the round of a step.
        study: what the trainer has to say of the paragraphs that a step begins; all ranks.
    """

    def __init__(
        self,
        task: Task,
        engine: Engine,
        config: TaskConfig,
        rounds: Stragglers,
        keep: Keep | None = None,
        study: Callable[[int, Sequence[Paragraph]], Sequence[Paragraph]] = lambda step, paragraphs: paragraphs,
    ) -> None:
        self.task, self.engine, self.config, self.rounds, self.study = task, engine, config, rounds, study
        self.keep = keep or (lambda generate, step, version: generate)

    def begin(self, step: int, paragraphs: Sequence[Paragraph], version: int) -> Begun:
        generate, studied = self.keep(self.engine.generate, step, version), self.study(step, paragraphs)
        return BegunGame(self, step, self.engine.begin(lambda: self.rounds.play(step, studied, generate)))

    def resume(self, left: Sequence[tuple[Place, Paragraph]]) -> None:
        keep, version = self.keep, self.engine.version
        self.rounds.resume((place, text, keep(self.engine.generate, place[0], version)) for place, text in left)


@dataclass(frozen=True)
class BegunGame:
    """A round of a game."""

    player: GamePlayer
    step: int
    begun: Conversation[Played]

    def finish(self) -> Round | None:
        played = self.player.engine.finish(self.begun)
        if played is None:
            return None
        task, config = self.player.task, self.player.config
        groups = task.groups(played.rollouts, self.step)
        samples = to_samples(
            groups,
            generator_weight=config.generator_weight,
            predictor_weight=config.predictor_weight,
        )
        staleness = _staleness(groups, self.player.engine.version)
        return Round(groups, samples, {**task.health(groups), **played.metrics, **staleness}, played.left)


@dataclass(frozen=True)
class TextPlayer:
    """Hands out supervised text: nothing is generated."""

    task: TextTask
    is_rank0: bool
    seed: int

    def begin(self, step: int, paragraphs: Sequence[Paragraph], version: int) -> Begun:
        return BegunText(self, step, paragraphs)

    def resume(self, left: Sequence[tuple[Place, Paragraph]]) -> None:
        """Text leaves nothing over."""


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
