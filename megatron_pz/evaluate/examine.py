"""One model through its suites: ask, grade, score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_pz.evaluate.grading import grade_all
from megatron_pz.evaluate.responses import Answer, Ask, Kept, Response, answer_all
from megatron_pz.evaluate.score import SuiteScore, sample_seed, score_suite
from megatron_pz.evaluate.suites.asking import fill, load_prompt
from megatron_pz.evaluate.suites.formats import Question
from megatron_pz.evaluate.suites.load import load_questions, suite_of
from megatron_pz.evaluate.suites.table import Suite
from megatron_pz.grade.judge import Judge


@dataclass(frozen=True)
class Examination:
    """What is asked, and how."""

    suites: Sequence[tuple[Suite, tuple[Question, ...], str]]  # with the template of the prompt
    max_new_tokens: int = 8192
    top_p: float = 1.0
    seed: int = 1234
    at_once: int = 256

    @property
    def num_asks(self) -> int:
        return sum(len(questions) * suite.num_samples for suite, questions, _ in self.suites)


@dataclass(frozen=True)
class Progress:
    """Whom to tell; nobody, unless given."""

    landed: Callable[[int], None] = field(default=lambda count: None)
    grading: Callable[[str], None] = field(default=lambda suite: None)
    row: Callable[[dict[str, Any]], None] = field(default=lambda row: None)


def prepare(
    names: Sequence[str],
    *,
    data: Path | None = None,
    prompts: Path | None = None,
    limit: int | None = None,
    num_samples: Mapping[str, int] | None = None,
    temperature: float | None = None,
    **how: Any,
) -> Examination:
    """The suites of these names, read and ready.

    Args:
        data: folder of local sets.
        prompts: folder of templates that stand in for the package's own.
        limit: only the first so many questions of each.
        num_samples: answers a question, by suite, in place of the suite's own; above 1 they are sampled.
        temperature: of suites that are sampled, in place of their own.
        how: further fields of `Examination`.

    Raises:
        ConfigError, CorpusError, TemplateError: a set or a template cannot be had.
    """
    ready = []
    for name in names:
        suite = suite_of(name)
        count = (num_samples or {}).get(name, suite.num_samples)
        # Several greedy answers would all be the same.
        heat = (suite.temperature or 1.0) if temperature is None else temperature
        suite = replace(suite, num_samples=count, temperature=heat if count > 1 else 0.0)
        ready.append((suite, tuple(load_questions(suite, data)[:limit]), load_prompt(suite, prompts)))
    return Examination(tuple(ready), **how)


async def examine(
    examination: Examination, model: str, answer: Answer, kept: Kept, judge: Judge, progress: Progress = Progress()
) -> dict[str, SuiteScore]:
    """Scores by suite. What is in `kept` is not asked for again.

    Args:
        model: name of the weights.
    """
    scores = {}
    for suite, questions, template in examination.suites:
        asks = [
            Ask(
                fill(template, question),
                examination.max_new_tokens,
                suite.temperature,
                examination.top_p,
                sample_seed(examination.seed, suite.name, question.id, sample) if suite.temperature else 0,
            )
            for question in questions
            for sample in range(suite.num_samples)
        ]
        told = await answer_all(asks, model, answer, kept, at_once=examination.at_once, landed=progress.landed)
        progress.grading(suite.name)
        scores[suite.name] = _scored(suite, questions, told, judge, model, progress)
    return scores


def _scored(
    suite: Suite, questions: Sequence[Question], told: Sequence[Response], judge: Judge, model: str, progress: Progress
) -> SuiteScore:
    count = suite.num_samples
    asked = [question for question in questions for _ in range(count)]
    graded = grade_all(suite, [(q, response.text) for q, response in zip(asked, told, strict=True)], judge)
    for place, (question, response, one) in enumerate(zip(asked, told, graded, strict=True)):
        progress.row(
            {
                "model": model,
                "suite": suite.name,
                "question": question.id,
                "sample": place % count,
                "target": question.target,
                "answer": one.answer,
                "scores": one.scores,
                "faults": one.faults,
                "found": one.is_found,
                "truncated": response.is_cut,
                "response": response.text,
            }
        )
    rows = range(0, len(told), count)
    return score_suite(
        suite, questions, [graded[at : at + count] for at in rows], [told[at : at + count] for at in rows]
    )
