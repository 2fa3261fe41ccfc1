r"""RL with verified rewards (docs/paper.md 7): a question, `n_predictions_per_mask` answers, a verifier that pays them.

1. The answer is the last `\boxed{}` of the response alone; without one the verifier is not asked, and the reward is
   `no_answer_reward`.
2. Wrong: 0. Right: 1 less the length penalty, in tokens of the answer.
3. Where the verifier gives no verdict the rollout is **unverified**: it is on record, and in no group that is learned from.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from megatron_pz.config.schema import EngineConfig, TaskConfig, VerifierConfig
from megatron_pz.corpus.tokenizer import load_tokenizer
from megatron_pz.errors import ConfigError, TemplateError
from megatron_pz.game.answers import read_answer
from megatron_pz.game.prompts import OWN_TEMPLATES, Templates, prompt_text
from megatron_pz.game.seeds import derive
from megatron_pz.grade.general_verifier import right_answer_reward
from megatron_pz.tasks.base import Seed
from megatron_pz.tasks.grouping import make_groups
from megatron_pz.tasks.health import health
from megatron_pz.tasks.together import joined, together
from megatron_pz.tasks.verifiers import Verifier, make_verifier
from megatron_pz.types import Generate, Group, Paragraph, Role, Rollout, SamplingParams, Tokenizer

UNVERIFIED = "unverified"
PLACEHOLDER = "{question}"


class Rlvr:
    """Questions are paragraphs with an `answer`; every rollout has the role of a prediction.

    Args:
        verifier: who pays; None: the one of the settings.
    """

    def __init__(
        self,
        task: TaskConfig,
        engine: EngineConfig,
        tokenizer: Tokenizer,
        templates: Templates,
        settings: VerifierConfig,
        verifier: Verifier | None = None,
    ) -> None:
        self.config, self.engine, self.tokenizer = task, engine, tokenizer
        self.templates, self.settings = templates, settings
        self.template = load_question_template(task.template_dir, task.prompt_style)
        self.verifier = verifier or make_verifier(settings)
        self._counts = load_tokenizer(settings.verifier_tokenizer) if settings.verifier_tokenizer else tokenizer
        if (empty := len(self.prompt_ids(""))) >= task.max_prompt_tokens:
            raise ConfigError(
                f"The question's template has {empty} tokens before any question is in it and task.max_prompt_tokens is "
                f"{task.max_prompt_tokens}. Shorten it or raise --max-prompt-tokens."
            )

    async def play(self, paragraphs: Sequence[Paragraph], generate: Generate, seed: Seed) -> list[Rollout]:
        """Answers by question."""
        return await joined(
            self.play_paragraph(paragraph, place, generate, seed) for place, paragraph in enumerate(paragraphs)
        )

    async def play_paragraph(self, paragraph: Paragraph, place: int, generate: Generate, seed: Seed) -> list[Rollout]:
        """Its part of `play`: one group."""
        text = self.template.replace(PLACEHOLDER, paragraph.text)
        ids = self.templates.ids(text, self.tokenizer)
        shown = prompt_text(self.templates, text, ids, self.tokenizer)
        return await together(
            self._answer(
                paragraph, shown, ids, generate, f"{seed[1]}.{place}", derive(*seed, place, paragraph.id, number)
            )
            for number in range(self.config.n_predictions_per_mask)
        )

    def groups(self, rollouts: Sequence[Rollout], step: int) -> list[Group]:
        """Groups of verified rollouts with their advantages; then those of unverified ones, which nothing learns from."""
        verified = make_groups([rollout for rollout in rollouts if not is_unverified(rollout)], self.config, step)
        left: dict[str, list[Rollout]] = {}
        for rollout in filter(is_unverified, rollouts):
            left.setdefault(rollout.group_id, []).append(rollout)
        apart = [
            Group(group_id, Role.PREDICTOR, tuple(group), (0.0,) * len(group), trained=False)
            for group_id, group in left.items()
        ]
        return [*verified, *apart]

    def health(self, groups: Sequence[Group]) -> dict[str, float]:
        """As of a game of predictions, over verified rollouts; and what the verifier said."""
        everything = [rollout for group in groups for rollout in group.rollouts]
        verified = [rollout for rollout in everything if not is_unverified(rollout)]
        values = health([group for group in groups if not is_unverified(group.rollouts[0])], self.config.match)
        values.pop("prediction/near_miss_rate", None)  # it speaks of text, and a verifier of meaning
        if everything:
            values["verifier/unverified_share"] = 1 - len(verified) / len(everything)
        if verified:
            values["verifier/right_share"] = fmean(rollout.reward > 0 for rollout in verified)
        if right := [rollout.reward for rollout in verified if rollout.reward > 0]:
            values["verifier/length_penalty"] = 1 - fmean(right)
        return values

    def prompt_ids(self, text: str) -> Sequence[int]:
        return self.templates.ids(self.template.replace(PLACEHOLDER, text), self.tokenizer)

    async def _answer(
        self, question: Paragraph, prompt: str, ids: Sequence[int], generate: Generate, group_id: str, seed: int
    ) -> Rollout:
        params = SamplingParams(
            max_new_tokens=self.engine.max_response_tokens,
            temperature=self.engine.temperature,
            top_p=self.engine.top_p,
            stop_token_ids=tuple(self.tokenizer.eos_token_ids),
            seed=seed,
        )
        completion = await generate(ids, params)
        response = self.tokenizer.decode(completion.token_ids)
        reading = read_answer(response, completion.finish_reason)
        reason = reading.reason or (None if reading.answer else "no_box")
        reward = self.settings.no_answer_reward
        if reason == "aborted":
            reason, reward = UNVERIFIED, 0.0
        elif reason is None and reading.answer:
            right = await self.verifier(question.text, question.answer, reading.answer)
            reason, reward = (
                (UNVERIFIED, 0.0) if right is None else (None, self._paid(reading.answer, question.answer, right))
            )
        return Rollout(
            role=Role.PREDICTOR,
            paragraph_id=question.id,
            group_id=group_id,
            mask_id=group_id,
            prompt=prompt,
            response=response,
            completion=completion,
            answer=reading.answer,
            target=question.answer,
            valid=reason is None,
            reject_reason=reason,
            reward=reward,
        )

    def _paid(self, answer: str, truth: str, right: bool) -> float:
        if not right:
            return 0.0
        lengths = len(self._counts.encode(answer)), len(self._counts.encode(truth))
        return right_answer_reward(*lengths, self.settings.length_penalty, self.settings.length_penalty_cap)


def is_unverified(rollout: Rollout) -> bool:
    """Whether no verifier gave a verdict on it."""
    return rollout.reject_reason == UNVERIFIED


def load_question_template(template_dir: str, style: str) -> str:
    """Text of `question.txt` in `template_dir`, or of the package's own for `style`.

    Raises:
        TemplateError: it is missing or lacks its placeholder.
    """
    file = (Path(template_dir) if template_dir else OWN_TEMPLATES / style) / "question.txt"
    try:
        text = file.read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(f"The template {file} cannot be read: {error}. `rlvr` asks with it.") from error
    if PLACEHOLDER not in text:
        raise TemplateError(
            f"The template {file} lacks its placeholder {PLACEHOLDER}. Put it where the question is to stand."
        )
    return text
