"""Asking the policy in either role, and reading what it says. Shared by the tasks and by the fixed questions."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

from megatron_pz.config.schema import EngineConfig, TaskConfig
from megatron_pz.errors import ConfigError, CorpusError
from megatron_pz.game.answers import read_answer
from megatron_pz.game.masking import MaskRules
from megatron_pz.game.prompts import Templates, prompt_text
from megatron_pz.game.rewards import PredictionReward, prediction_reward
from megatron_pz.game.seeds import derive
from megatron_pz.game.spans import SpanReading, read_span
from megatron_pz.types import Completion, Generate, Mask, Paragraph, Role, Rollout, SamplingParams, Tokenizer

PROMPTS_KEPT = 1024
"""Made last, of both roles: some tens of megabytes."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the engine is asked."""

    text: str  # as a record shows it
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Proposal:
    """A mask response that was read but not yet paid: its reward waits for the predictions."""

    completion: Completion
    response: str
    reading: SpanReading


class Asker:
    """Makes prompts of both roles, has them answered and reads the answers.

    Raises:
        TokenizerError: `prompt_style` is chat and the tokenizer has no chat template.
        ConfigError: a prompt is over `max_prompt_tokens` before it holds any text.
    """

    def __init__(self, task: TaskConfig, engine: EngineConfig, tokenizer: Tokenizer, templates: Templates) -> None:
        self.task, self.engine, self.tokenizer, self.templates = task, engine, tokenizer, templates
        self.rules = MaskRules.of(task)
        for template in (templates.mask, templates.prediction):
            empty = len(templates.ids(template.fill(""), tokenizer))
            if empty >= task.max_prompt_tokens:
                raise ConfigError(
                    f"The template {template.file} has {empty} tokens before any text is in it and "
                    f"task.max_prompt_tokens is {task.max_prompt_tokens}. Shorten it or raise --max-prompt-tokens."
                )
        self._stop = {role: templates.stop_token_ids(role, tokenizer) for role in Role}
        # A mask's question is asked for its length and then for its ids, and equal masks of a paragraph have one.
        self._prompt = lru_cache(maxsize=PROMPTS_KEPT)(self._made)

    def mask_prompt(self, text: str) -> Prompt:
        return self._prompt(self.templates.mask_prompt(text))

    def prediction_prompt(self, masked_text: str) -> Prompt:
        return self._prompt(self.templates.prediction_prompt(masked_text))

    def fits(self, mask: Mask) -> bool:
        """True where the question about `mask` is within `max_prompt_tokens`."""
        return len(self.prediction_prompt(mask.masked_text).ids) <= self.task.max_prompt_tokens

    def checked_mask_prompt(self, paragraph: Paragraph) -> Prompt:
        """The mask prompt of `paragraph`.

        Raises:
            CorpusError: it is longer than `max_prompt_tokens`.
        """
        prompt = self.mask_prompt(paragraph.text)
        if len(prompt.ids) > self.task.max_prompt_tokens:
            raise CorpusError(
                f"The mask prompt of paragraph {paragraph.id} has {len(prompt.ids)} tokens; task.max_prompt_tokens is "
                f"{self.task.max_prompt_tokens}. Lower --max-paragraph-tokens or raise --max-prompt-tokens."
            )
        return prompt

    async def propose(self, prompt: Prompt, paragraph: Paragraph, generate: Generate, seed: int) -> Proposal:
        """One mask response about `paragraph`, read."""
        completion = await generate(prompt.ids, self.params(Role.GENERATOR, seed))
        response = self.tokenizer.decode(completion.token_ids)
        whole = self.templates.mask.answer_prefix + response
        rng = random.Random(derive(seed, "occurrence"))
        reading = read_span(whole, paragraph, completion.finish_reason, self.rules, rng)
        if reading.mask is not None and not self.fits(reading.mask):
            reading = SpanReading(reading.answer, None, "prompt_too_long")
        return Proposal(completion, response, reading)

    async def predict(
        self,
        mask: Mask,
        generate: Generate,
        seed: int,
        *,
        mask_id: str,
        prompt: Prompt | None = None,
        temperature: float | None = None,
        reward: PredictionReward = prediction_reward,
    ) -> Rollout:
        """One prediction of the words that `mask` hides, read and paid; its group is that of the mask.

        Args:
            prompt: `prediction_prompt(mask.masked_text)`, where the caller has it already.
            temperature: in place of `engine.temperature`; 0 is greedy.
            reward: Eq. 8; what a baseline pays in place of it. An answer that does not count comes to it as None.
        """
        prompt = prompt or self.prediction_prompt(mask.masked_text)
        completion = await generate(prompt.ids, self.params(Role.PREDICTOR, seed, temperature))
        response = self.tokenizer.decode(completion.token_ids)
        reading = read_answer(self.templates.prediction.answer_prefix + response, completion.finish_reason)
        counted = reading.answer if reading.reason is None else None
        return Rollout(
            role=Role.PREDICTOR,
            paragraph_id=mask.paragraph_id,
            group_id=mask_id,
            mask_id=mask_id,
            prompt=prompt.text,
            response=response,
            completion=completion,
            answer=reading.answer,
            target=mask.answer,
            valid=reading.reason is None,
            reject_reason=reading.reason,
            reward=reward(counted, mask.answer, self.task.match),
            mask=mask,
        )

    def params(self, role: Role, seed: int, temperature: float | None = None) -> SamplingParams:
        return SamplingParams(
            max_new_tokens=self.engine.max_response_tokens,
            temperature=self.engine.temperature if temperature is None else temperature,
            top_p=self.engine.top_p,
            stop_token_ids=self._stop[role],
            seed=seed,
        )

    def _made(self, text: str) -> Prompt:
        ids = self.templates.ids(text, self.tokenizer)
        return Prompt(prompt_text(self.templates, text, ids, self.tokenizer), tuple(ids))
