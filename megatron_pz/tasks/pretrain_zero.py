"""PretrainZero's round (docs/paper.md 2.10): masks, and for each mask its predictions, which start as soon as it lands.

1. Each response's seed derives from (run, step, paragraph, role, indices): the round does not depend on landing order.
2. A mask that cannot be hidden earns 0, is predicted by nobody and stays in its group.
3. Equal masks of one paragraph are each predicted on their own.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_pz.config.schema import EngineConfig, TaskConfig
from megatron_pz.game.prompts import Templates
from megatron_pz.game.rewards import INVALID_MASK_REWARD, PredictionReward, mask_reward, prediction_reward
from megatron_pz.game.seeds import derive
from megatron_pz.tasks.ask import Asker, Prompt, Proposal
from megatron_pz.tasks.base import Seed
from megatron_pz.tasks.grouping import make_groups
from megatron_pz.tasks.health import health
from megatron_pz.tasks.together import joined, together
from megatron_pz.types import Generate, Group, Mask, Paragraph, Role, Rollout, Tokenizer


class PretrainZero:
    """The two-level game: one policy names the span, then fills it in."""

    def __init__(self, task: TaskConfig, engine: EngineConfig, tokenizer: Tokenizer, templates: Templates) -> None:
        self.config = task
        self.asker = Asker(task, engine, tokenizer, templates)

    async def play(self, paragraphs: Sequence[Paragraph], generate: Generate, seed: Seed) -> list[Rollout]:
        """Rollouts by paragraph, then by mask: the mask rollout, then its predictions.

        Raises:
            CorpusError: a paragraph's mask prompt is longer than `max_prompt_tokens`.
        """
        prompts = [self.asker.checked_mask_prompt(paragraph) for paragraph in paragraphs]
        return await joined(
            self._paragraph(paragraph, prompts[place], place, generate, seed)
            for place, paragraph in enumerate(paragraphs)
        )

    async def play_paragraph(self, paragraph: Paragraph, place: int, generate: Generate, seed: Seed) -> list[Rollout]:
        """Its part of `play`, by mask."""
        return await self._paragraph(paragraph, self.asker.checked_mask_prompt(paragraph), place, generate, seed)

    def groups(self, rollouts: Sequence[Rollout], step: int) -> list[Group]:
        return make_groups(rollouts, self.config, step)

    def health(self, groups: Sequence[Group]) -> dict[str, float]:
        return health(groups, self.config.match)

    def prompt_ids(self, text: str) -> Sequence[int]:
        return self.asker.mask_prompt(text).ids

    async def _paragraph(
        self, paragraph: Paragraph, prompt: Prompt, place: int, generate: Generate, seed: Seed
    ) -> list[Rollout]:
        return await joined(
            self._line(paragraph, prompt, generate, seed, place, index)
            for index in range(self.config.n_masks_per_paragraph)
        )

    async def _line(
        self, paragraph: Paragraph, prompt: Prompt, generate: Generate, seed: Seed, place: int, index: int
    ) -> list[Rollout]:
        own = derive(*seed, place, paragraph.id, str(Role.GENERATOR), index)
        proposal = await self.asker.propose(prompt, paragraph, generate, own)
        group_id = f"{seed[1]}.{place}"
        mask_id = f"{group_id}.{index}"
        mask, reward, predictions = proposal.reading.mask, INVALID_MASK_REWARD, []
        if mask is not None:
            predictions = await predict_all(self.asker, mask, generate, seed, place, index)
            reward = mask_reward(sum(p.reward == 1 for p in predictions), len(predictions))
        return [_mask_rollout(proposal, prompt, paragraph, group_id, mask_id, reward), *predictions]


async def predict_all(
    asker: Asker,
    mask: Mask,
    generate: Generate,
    seed: Seed,
    place: int,
    index: int,
    reward: PredictionReward = prediction_reward,
) -> list[Rollout]:
    """The prediction group of mask `index` on the paragraph at `place` in the round."""
    prompt = asker.prediction_prompt(mask.masked_text)
    return await together(
        asker.predict(
            mask,
            generate,
            derive(*seed, place, mask.paragraph_id, str(Role.PREDICTOR), index, number),
            mask_id=f"{seed[1]}.{place}.{index}",
            prompt=prompt,
            reward=reward,
        )
        for number in range(asker.task.n_predictions_per_mask)
    )


def _mask_rollout(
    proposal: Proposal, prompt: Prompt, paragraph: Paragraph, group_id: str, mask_id: str, reward: float
) -> Rollout:
    reading = proposal.reading
    return Rollout(
        role=Role.GENERATOR,
        paragraph_id=paragraph.id,
        group_id=group_id,
        mask_id=mask_id,
        prompt=prompt.text,
        response=proposal.response,
        completion=proposal.completion,
        answer=reading.answer,
        target=None,
        valid=reading.mask is not None,
        reject_reason=reading.reason,
        reward=reward,
        mask=reading.mask,
    )
