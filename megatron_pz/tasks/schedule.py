"""Another game first: `warm_up_task` for `warm_up_task_steps` steps, then `task` (the SmolLM3 recipe, docs/paper.md 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_pz.tasks.base import Seed, Task
from megatron_pz.types import Generate, Group, Paragraph, Rollout


@dataclass(frozen=True)
class Scheduled:
    """`first` up to step `num_steps`, `then` afterwards."""

    first: Task
    num_steps: int
    then: Task

    def at(self, step: int) -> Task:
        """The game of `step`, from 1."""
        return self.first if step <= self.num_steps else self.then

    async def play(self, paragraphs: Sequence[Paragraph], generate: Generate, seed: Seed) -> list[Rollout]:
        return await self.at(seed[1]).play(paragraphs, generate, seed)

    async def play_paragraph(self, paragraph: Paragraph, place: int, generate: Generate, seed: Seed) -> list[Rollout]:
        return await self.at(seed[1]).play_paragraph(paragraph, place, generate, seed)

    def groups(self, rollouts: Sequence[Rollout], step: int) -> list[Group]:
        return self.at(step).groups(rollouts, step)

    def health(self, groups: Sequence[Group]) -> dict[str, float]:
        """Games measure what was played in the same way."""
        return self.then.health(groups)

    def prompt_ids(self, text: str) -> Sequence[int]:
        """The longer of the two: a paragraph must fit both."""
        return max(self.first.prompt_ids(text), self.then.prompt_ids(text), key=len)
