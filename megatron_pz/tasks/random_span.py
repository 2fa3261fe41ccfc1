"""The same prediction game on spans that chance chose.

`random_span`   Random RLPT, the paper's strong baseline (docs/paper.md 5).
`format_only`   its control, ours: any answer that can be read is paid, so that what it gains is format.

No generator role: all rollouts are predictions. A paragraph without a valid span in reach is passed over.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from megatron_pz.config.schema import EngineConfig, TaskConfig
from megatron_pz.game.prompts import Templates
from megatron_pz.game.random_spans import random_mask
from megatron_pz.game.rewards import format_reward, prediction_reward
from megatron_pz.game.seeds import derive
from megatron_pz.tasks.ask import Asker
from megatron_pz.tasks.base import Seed
from megatron_pz.tasks.grouping import make_groups
from megatron_pz.tasks.health import health
from megatron_pz.tasks.pretrain_zero import predict_all
from megatron_pz.tasks.together import joined
from megatron_pz.types import Generate, Group, Mask, Paragraph, Rollout, Tokenizer


class RandomSpan:
    """`n_masks_per_paragraph` random spans a paragraph, `n_predictions_per_mask` predictions of each."""

    def __init__(self, task: TaskConfig, engine: EngineConfig, tokenizer: Tokenizer, templates: Templates) -> None:
        self.config = task
        self.asker = Asker(task, engine, tokenizer, templates)
        self.reward = format_reward if task.task == "format_only" else prediction_reward

    async def play(self, paragraphs: Sequence[Paragraph], generate: Generate, seed: Seed) -> list[Rollout]:
        """Predictions by paragraph, then by mask."""
        return await joined(
            self.play_paragraph(paragraph, place, generate, seed) for place, paragraph in enumerate(paragraphs)
        )

    async def play_paragraph(self, paragraph: Paragraph, place: int, generate: Generate, seed: Seed) -> list[Rollout]:
        """Its part of `play`, by mask."""
        return await joined(
            predict_all(self.asker, mask, generate, seed, place, index, self.reward)
            for index in range(self.config.n_masks_per_paragraph)
            if (mask := self._mask(paragraph, seed, place, index)) is not None
        )

    def groups(self, rollouts: Sequence[Rollout], step: int) -> list[Group]:
        return make_groups(rollouts, self.config, step)

    def health(self, groups: Sequence[Group]) -> dict[str, float]:
        return health(groups, self.config.match)

    def prompt_ids(self, text: str) -> Sequence[int]:
        return self.asker.prediction_prompt(text).ids

    def _mask(self, paragraph: Paragraph, seed: Seed, place: int, index: int) -> Mask | None:
        return random_mask(
            paragraph,
            self.asker.rules,
            random.Random(derive(*seed, place, paragraph.id, "span", index)),
            span_p=self.config.span_p,
            max_words=self.config.span_max_words,
            fits=self.asker.fits,
        )
