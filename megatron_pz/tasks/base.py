"""What a task is, and what it says about its own health.

A task that generates plays a round with an engine it knows only as `generate`, groups what came back, and measures it.
A task of plain text hands out samples. Neither knows torch, Megatron or HTTP.
"""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from typing import Any, Protocol, runtime_checkable

from megatron_pz.types import Generate, Group, Paragraph, Rollout, Sample

Seed = tuple[int, int]
"""(seed of the run, step): all draws of a round derive from it."""


@runtime_checkable
class Task(Protocol):
    """A game: PretrainZero or its random-span baseline."""

    async def play(self, paragraphs: Sequence[Paragraph], generate: Generate, seed: Seed) -> list[Rollout]:
        """All rollouts of one round, rewarded; their order and content do not depend on which response lands first."""
        ...

    def play_paragraph(
        self, paragraph: Paragraph, place: int, generate: Generate, seed: Seed
    ) -> Coroutine[Any, Any, list[Rollout]]:
        """What `play` makes of the paragraph at `place` of its round: `play` is these, one after another."""
        ...

    def groups(self, rollouts: Sequence[Rollout], step: int) -> list[Group]:
        """`rollouts` by prompt, with advantages; `trained` is false where a group is dropped or not due at `step`."""
        ...

    def health(self, groups: Sequence[Group]) -> dict[str, float]:
        """Metrics that `report.metrics` has under rewards, masks, predictions and groups; one about nothing is left out."""
        ...

    def prompt_ids(self, text: str) -> Sequence[int]:
        """The first prompt about a paragraph of this text: what `corpus.paragraphs.select` measures."""
        ...


@runtime_checkable
class TextTask(Protocol):
    """Supervised training: nothing is generated."""

    def samples(self, paragraphs: Sequence[Paragraph], seed: Seed) -> list[Sample]:
        """What the update learns from; `role` is None in each."""
        ...

    def prompt_ids(self, text: str) -> Sequence[int]:
        """The prompt about a paragraph of this text; empty where there is none."""
        ...
