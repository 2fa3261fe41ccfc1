"""A game without a generator: all rollouts are predictions, asked and paid alike, so that only what is hidden differs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from megatron_pz.config.schema import EngineConfig, TaskConfig
from megatron_pz.game.prompts import Templates
from megatron_pz.game.rewards import PredictionReward, prediction_reward
from megatron_pz.tasks.ask import Asker
from megatron_pz.tasks.base import Seed
from megatron_pz.tasks.grouping import make_groups
from megatron_pz.tasks.health import health
from megatron_pz.tasks.pretrain_zero import predict_all
from megatron_pz.tasks.together import joined
from megatron_pz.types import Generate, Group, Mask, Paragraph, Rollout, Tokenizer


class Predicting(ABC):
    """`n_masks_per_paragraph` masks a paragraph, `n_predictions_per_mask` predictions of each; a child hides."""

    reward: PredictionReward = staticmethod(prediction_reward)

    def __init__(self, task: TaskConfig, engine: EngineConfig, tokenizer: Tokenizer, templates: Templates) -> None:
        self.config = task
        self.asker = Asker(task, engine, tokenizer, templates)

    @abstractmethod
    def masks(self, paragraph: Paragraph, seed: Seed, place: int) -> list[Mask | None]:
        """The masks of the paragraph at `place` of its round; None where nothing in reach can be hidden."""

    async def play(self, paragraphs: Sequence[Paragraph], generate: Generate, seed: Seed) -> list[Rollout]:
        """Predictions by paragraph, then by mask."""
        return await joined(
            self.play_paragraph(paragraph, place, generate, seed) for place, paragraph in enumerate(paragraphs)
        )

    async def play_paragraph(self, paragraph: Paragraph, place: int, generate: Generate, seed: Seed) -> list[Rollout]:
        """Its part of `play`, by mask."""
        return await joined(
            predict_all(self.asker, mask, generate, seed, place, index, self.reward)
            for index, mask in enumerate(self.masks(paragraph, seed, place))
            if mask is not None
        )

    def groups(self, rollouts: Sequence[Rollout], step: int) -> list[Group]:
        return make_groups(rollouts, self.config, step)

    def health(self, groups: Sequence[Group]) -> dict[str, float]:
        return health(groups, self.config.match)

    def prompt_ids(self, text: str) -> Sequence[int]:
        return self.asker.prediction_prompt(text).ids
