"""Next-token reasoning, the paper's other baselines (docs/paper.md 5): the text is cut behind a token, and the policy, after
thinking, predicts that token.

`random_ntp`   the token is any of the paragraph's.
`entropy_ntp`  it is one of the `entropy_share` of tokens that the policy itself is least sure of.

1. All rollouts are predictions, asked and paid as in the other games, so that only what is hidden differs.
2. A paragraph without a token that can be asked for is passed over.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from megatron_pz.config.schema import EngineConfig, TaskConfig
from megatron_pz.errors import ConfigError
from megatron_pz.game.next_tokens import hardest, next_token_mask
from megatron_pz.game.prompts import Templates
from megatron_pz.game.seeds import derive
from megatron_pz.tasks.ask import Asker
from megatron_pz.tasks.base import Seed
from megatron_pz.tasks.grouping import make_groups
from megatron_pz.tasks.health import health
from megatron_pz.tasks.pretrain_zero import predict_all
from megatron_pz.tasks.together import joined
from megatron_pz.types import Generate, Group, Paragraph, Rollout, Tokenizer


class NextToken:
    """`n_masks_per_paragraph` tokens a paragraph, `n_predictions_per_mask` predictions of each."""

    def __init__(self, task: TaskConfig, engine: EngineConfig, tokenizer: Tokenizer, templates: Templates) -> None:
        self.config = task
        self.asker = Asker(task, engine, tokenizer, templates)
        self.by_entropy = task.task == "entropy_ntp"

    async def play(self, paragraphs: Sequence[Paragraph], generate: Generate, seed: Seed) -> list[Rollout]:
        """Predictions by paragraph, then by token."""
        return await joined(
            self.play_paragraph(paragraph, place, generate, seed) for place, paragraph in enumerate(paragraphs)
        )

    async def play_paragraph(self, paragraph: Paragraph, place: int, generate: Generate, seed: Seed) -> list[Rollout]:
        """Its part of `play`, by token.

        Raises:
            ConfigError: `entropy_ntp` is played where nobody measures the policy's entropies.
        """
        tokenizer = self.asker.tokenizer
        token_ids = tokenizer.encode(paragraph.text)
        places = self._places(paragraph, len(token_ids))
        masks = [
            next_token_mask(
                paragraph,
                token_ids,
                places,
                tokenizer.decode,
                random.Random(derive(*seed, place, paragraph.id, "token", index)),
                fits=self.asker.fits,
            )
            for index in range(self.config.n_masks_per_paragraph)
        ]
        return await joined(
            predict_all(self.asker, mask, generate, seed, place, index)
            for index, mask in enumerate(masks)
            if mask is not None
        )

    def groups(self, rollouts: Sequence[Rollout], step: int) -> list[Group]:
        return make_groups(rollouts, self.config, step)

    def health(self, groups: Sequence[Group]) -> dict[str, float]:
        return health(groups, self.config.match)

    def prompt_ids(self, text: str) -> Sequence[int]:
        return self.asker.prediction_prompt(text).ids

    def _places(self, paragraph: Paragraph, num_tokens: int) -> Sequence[int]:
        if not self.by_entropy:
            return range(1, num_tokens)
        if paragraph.token_entropies is None:
            raise ConfigError(
                "task.task is 'entropy_ntp', which asks for the tokens that the policy is least sure of; only a trainer can "
                "measure that, and there is none here. Play it in a training run, or use --task random_ntp."
            )
        assert len(paragraph.token_entropies) == num_tokens, (len(paragraph.token_entropies), num_tokens)
        return hardest(paragraph.token_entropies, self.config.entropy_share)
