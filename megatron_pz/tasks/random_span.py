"""The same prediction game on spans that chance chose.

`random_span`   Random RLPT, the paper's strong baseline (docs/paper.md 5).
`format_only`   its control, ours: any answer that can be read is paid, so that what it gains is format.

A paragraph without a valid span in reach is passed over.
"""

from __future__ import annotations

import random

from megatron_pz.config.schema import EngineConfig, TaskConfig
from megatron_pz.game.prompts import Templates
from megatron_pz.game.random_spans import random_mask
from megatron_pz.game.rewards import format_reward
from megatron_pz.game.seeds import derive
from megatron_pz.tasks.base import Seed
from megatron_pz.tasks.predicting import Predicting
from megatron_pz.types import Mask, Paragraph, Tokenizer


class RandomSpan(Predicting):
    """Random spans."""

    def __init__(self, task: TaskConfig, engine: EngineConfig, tokenizer: Tokenizer, templates: Templates) -> None:
        super().__init__(task, engine, tokenizer, templates)
        if task.task == "format_only":
            self.reward = format_reward

    def masks(self, paragraph: Paragraph, seed: Seed, place: int) -> list[Mask | None]:
        return [
            random_mask(
                paragraph,
                self.asker.rules,
                random.Random(derive(*seed, place, paragraph.id, "span", index)),
                span_p=self.config.span_p,
                max_words=self.config.span_max_words,
                fits=self.asker.fits,
            )
            for index in range(self.config.n_masks_per_paragraph)
        ]
