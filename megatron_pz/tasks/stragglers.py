"""Rounds that do not wait for their slowest paragraphs (`engine.stragglers`).

`wait`      a round begins `paragraphs_per_step` paragraphs and ends when all are done.
`cut`       it begins `over_sampling` more, ends when `paragraphs_per_step` are done, and gives the others up.
`continue`  the others go on and count among those of the next round, which begins as many less.

1. The first to land are taken; of those that land together, the first that were begun.
2. Seeds and group ids are those of the step that began a paragraph: a round that took all it began is that of `wait`.
3. What a round took is put on record, so that a resume that plays it again takes the same.
4. Rounds may be under way together: they end in the order of their steps, and none takes what a later one began.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_pz.config.schema import EngineConfig
from megatron_pz.tasks.base import Task
from megatron_pz.types import Completion, Generate, Paragraph, Rollout, SamplingParams

Place = tuple[int, int]
"""A paragraph that is played: the step that began it, and its index among the paragraphs of that step."""


def num_begun(engine: EngineConfig, per_step: int, step: int) -> int:
    """Paragraphs that the round of `step` (from 1) begins.

    >>> cut, go_on = (EngineConfig(stragglers=how, over_sampling=0.25) for how in ("cut", "continue"))
    >>> [num_begun(cut, 10, step) for step in (1, 2, 3)], [num_begun(go_on, 10, step) for step in (1, 2, 3)]
    ([13, 13, 13], [13, 10, 10])
    """
    if engine.stragglers == "wait" or (engine.stragglers == "continue" and step > 1):
        return per_step
    return math.ceil(per_step * (1 + engine.over_sampling))


@dataclass(frozen=True)
class Played:
    """What a round ended with."""

    rollouts: list[Rollout]  # in the order in which their paragraphs were begun
    left: tuple[Place, ...] = ()  # `continue`: begun up to this step and still to come; a checkpoint needs them
    metrics: Mapping[str, float] = field(default_factory=dict)


class Watched:
    """A `types.Generate` that counts the requests that were given up."""

    def __init__(self, generate: Generate) -> None:
        self._generate = generate
        self.num_aborted = 0

    async def __call__(self, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        try:
            return await self._generate(prompt_ids, params)
        except asyncio.CancelledError:
            self.num_aborted += 1
            raise


class Stragglers:
    """Plays rounds of a task. All of them in one event loop.

    Args:
        per_step: paragraphs that a round ends with.
        seed: of the run.
        recorded: what the round of a step took when it was played before; None: it was not.
        record: puts that on record.
    """

    def __init__(
        self,
        task: Task,
        engine: EngineConfig,
        per_step: int,
        seed: int,
        recorded: Callable[[int], Sequence[Place] | None] = lambda step: None,
        record: Callable[[int, Sequence[Place]], None] = lambda step, taken: None,
    ) -> None:
        self.task, self.how, self.per_step, self.seed = task, engine.stragglers, per_step, seed
        self._recorded, self._record = recorded, record
        self._again: dict[Place, tuple[Paragraph, Generate]] = {}
        self._under_way = UnderWay()
        self._turn = asyncio.Lock()

    def resume(self, left: Iterable[tuple[Place, Paragraph, Generate]]) -> None:
        """Have what a checkpoint's round left (`Played.left`) begun again by the next round, each paragraph with the
        `generate` of the step that began it."""
        self._again = {place: (paragraph, generate) for place, paragraph, generate in left}

    async def play(self, step: int, paragraphs: Sequence[Paragraph], generate: Generate) -> Played:
        """The round of `step`. Call it in the order of the steps.

        Args:
            paragraphs: what it begins: `num_begun` of them.
        """
        if self.how == "wait":
            return Played(await self.task.play(paragraphs, generate, (self.seed, step)))
        own = {(step, index): (paragraph, generate) for index, paragraph in enumerate(paragraphs)}
        known = self._recorded(step)
        return await (self._cut(step, own, known) if self.how == "cut" else self._continue(step, own, known))

    async def close(self) -> None:
        """Give up what is under way."""
        await self._under_way.give_up()

    async def _cut(
        self, step: int, own: Mapping[Place, tuple[Paragraph, Generate]], recorded: Sequence[Place] | None
    ) -> Played:
        known = self._possible(recorded, own)
        watched, under_way = Watched(next(iter(own.values()))[1]), UnderWay()
        for place, (paragraph, _) in own.items():
            if known is None or place in known:
                under_way.add(place, self._played(place, paragraph, watched))
        try:
            taken = known or await under_way.first(self.per_step, step)
            rollouts = await under_way.take(taken)
        finally:
            await under_way.give_up()
        if known is None:
            self._record(step, taken)
        metrics = {
            "rounds/paragraphs_cut": float(len(own) - len(taken)),
            "rounds/requests_aborted": float(watched.num_aborted),
        }
        return Played(rollouts, (), metrics)

    async def _continue(
        self, step: int, own: Mapping[Place, tuple[Paragraph, Generate]], recorded: Sequence[Place] | None
    ) -> Played:
        under_way = self._under_way
        for place, (paragraph, generate) in {**self._again, **own}.items():
            under_way.add(place, self._played(place, paragraph, generate))
        self._again = {}
        try:
            async with self._turn:
                due = [place for place in under_way.tasks if place[0] <= step]
                known = self._possible(recorded, due)
                taken = known or await under_way.first(self.per_step, step)
                rollouts = await under_way.take(taken)
        except BaseException:
            await self.close()
            raise
        if known is None:
            self._record(step, taken)
        left = tuple(place for place in due if place not in taken)
        return Played(rollouts, left, {"rounds/paragraphs_continued": float(len(left))})

    def _possible(self, recorded: Sequence[Place] | None, due: Collection[Place]) -> list[Place] | None:
        """What the round took before, if it can take it again."""
        if not recorded or len(recorded) != min(self.per_step, len(due)) or not set(recorded) <= set(due):
            return None
        return list(recorded)

    def _played(self, place: Place, paragraph: Paragraph, generate: Generate) -> Coroutine[Any, Any, list[Rollout]]:
        step, index = place
        return self.task.play_paragraph(paragraph, index, generate, (self.seed, step))


@dataclass(frozen=True)
class UnderWay:
    """Paragraphs that are played."""

    tasks: dict[Place, asyncio.Task[list[Rollout]]] = field(default_factory=dict)  # in the order of `add`
    landed: list[Place] = field(default_factory=list)  # in the order in which they were done
    news: asyncio.Event = field(default_factory=asyncio.Event)  # another one landed

    def add(self, place: Place, played: Coroutine[Any, Any, list[Rollout]]) -> None:
        """Begin to play."""

        def land(task: object) -> None:
            self.landed.append(place)
            self.news.set()

        self.tasks[place] = asyncio.ensure_future(played)
        self.tasks[place].add_done_callback(land)

    async def first(self, wanted: int, last_step: int) -> list[Place]:
        """The first `wanted` to land of those that were begun up to `last_step` (all, if there are no more), in the
        order of `add`. The first error among them is raised."""
        due = {place: task for place, task in self.tasks.items() if place[0] <= last_step}
        wanted = min(wanted, len(due))
        while True:
            self.news.clear()
            landed = [place for place in self.landed if place in due]
            for place in landed:
                due[place].result()
            if len(landed) >= wanted:
                taken = set(landed[:wanted])
                return [place for place in due if place in taken]
            await self.news.wait()

    async def take(self, places: Sequence[Place]) -> list[Rollout]:
        """Rollouts of `places`, once they are there; these are under way no more."""
        rollouts = []
        for place in places:
            rollouts += await self.tasks[place]
        for place in places:
            del self.tasks[place]
        return rollouts

    async def give_up(self) -> None:
        """End all of them."""
        tasks = [*self.tasks.values()]
        self.tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
