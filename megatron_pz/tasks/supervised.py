r"""Training on text as it is, and on the two formats, by ordinary cross-entropy.

`continue_pt` learns the paragraphs; `sft` learns to answer both prompts about seeded random spans, without thinking:
``\mask{ word}`` and ``\boxed{ word}``, each with the end token. The space after the brace makes the answer's tokens
those that the word has inside the text; readers strip it.

1. Prompt and response are tokenised apart, as in play: the prompt's ids are those that the engine will see.
2. The first token of a sequence is never trained: nothing comes before it.
3. An answer that the prompt has already opened (`Template.answer_prefix`) is not written twice.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from megatron_pz.config.schema import EngineConfig, TaskConfig
from megatron_pz.game.prompts import COMMANDS, Templates
from megatron_pz.game.random_spans import random_mask
from megatron_pz.game.seeds import derive
from megatron_pz.tasks.ask import Asker, Prompt
from megatron_pz.tasks.base import Seed
from megatron_pz.types import Mask, Paragraph, Role, Sample, Tokenizer


class ContinuePretraining:
    """Next-token training: one sample a paragraph, ended by the end token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def samples(self, paragraphs: Sequence[Paragraph], seed: Seed) -> list[Sample]:
        return [self._sample(paragraph, f"{seed[1]}.{place}") for place, paragraph in enumerate(paragraphs)]

    def prompt_ids(self, text: str) -> Sequence[int]:
        return ()

    def _sample(self, paragraph: Paragraph, group_id: str) -> Sample:
        ids = [*self.tokenizer.bos_token_ids, *self.tokenizer.encode(paragraph.text), self.tokenizer.eos_token_ids[0]]
        return _supervised(ids, [1.0] * len(ids), group_id)


class SupervisedFormats:
    """Two samples a paragraph: a mask example and a prediction example, on spans of their own, new at every step."""

    def __init__(self, task: TaskConfig, engine: EngineConfig, tokenizer: Tokenizer, templates: Templates) -> None:
        self.config = task
        self.asker = Asker(task, engine, tokenizer, templates)

    def samples(self, paragraphs: Sequence[Paragraph], seed: Seed) -> list[Sample]:
        """Samples by paragraph; a paragraph without a valid span in reach has none."""
        samples = []
        for place, paragraph in enumerate(paragraphs):
            for role in Role:
                mask = self._mask(paragraph, derive(*seed, place, paragraph.id, "span", str(role)))
                if mask is not None:
                    samples.append(self._sample(role, paragraph, mask, f"{seed[1]}.{place}.{role}"))
        return samples

    def prompt_ids(self, text: str) -> Sequence[int]:
        return self.asker.mask_prompt(text).ids

    def response(self, role: Role, answer: str) -> str:
        """What the policy is to say, behind what the prompt has opened; the end token comes after it."""
        whole = f"\\{COMMANDS[role]}{{ {answer}}}"
        return whole.removeprefix(self.asker.templates.of(role).answer_prefix)

    def _mask(self, paragraph: Paragraph, seed: int) -> Mask | None:
        return random_mask(
            paragraph,
            self.asker.rules,
            random.Random(seed),
            span_p=self.config.span_p,
            max_words=self.config.span_max_words,
            fits=self.asker.fits,
        )

    def _sample(self, role: Role, paragraph: Paragraph, mask: Mask, group_id: str) -> Sample:
        tokenizer = self.asker.tokenizer
        prompt: Prompt = (
            self.asker.checked_mask_prompt(paragraph)
            if role is Role.GENERATOR
            else self.asker.prediction_prompt(mask.masked_text)
        )
        response = [*tokenizer.encode(self.response(role, mask.answer)), tokenizer.eos_token_ids[0]]
        weights = [self.config.prompt_weight] * len(prompt.ids) + [self.config.answer_weight] * len(response)
        return _supervised([*prompt.ids, *response], weights, group_id)


def _supervised(ids: Sequence[int], weights: Sequence[float], group_id: str) -> Sample:
    return Sample(
        token_ids=tuple(ids),
        loss_weights=(0.0, *weights[1:]),
        rollout_log_probs=(0.0,) * len(ids),
        advantage=1.0,
        role=None,
        group_id=group_id,
    )
