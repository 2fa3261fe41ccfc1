"""A model's scores on its suites, with intervals and the paper's averages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from megatron_pz.evaluate.grading import Graded
from megatron_pz.evaluate.intervals import Estimate, average, estimate, resampled
from megatron_pz.evaluate.responses import Response
from megatron_pz.evaluate.suites.formats import Question
from megatron_pz.evaluate.suites.table import AVERAGES, GENERAL, HEADLINE, MATH, OVERALL, Suite
from megatron_pz.game.seeds import derive


@dataclass(frozen=True)
class SuiteScore:
    """One suite of one model. All but counts are shares."""

    suite: str
    num_questions: int
    num_samples: int  # answers a question; 1: one answer, and mean@k otherwise
    headline: str  # name of the grader in averages
    scores: Mapping[str, Estimate]  # by grader
    question_means: tuple[float, ...]  # of the headline grader
    not_found_share: float  # responses that announce no answer the headline grader can read
    guessed: (
        float | None
    )  # choice: the headline score if each of those were a random option (MMLU-Pro's own rule, its expectation)
    truncated_share: float
    mean_tokens: float
    num_faults: Mapping[str, int]  # comparisons that were ended or failed, by grader; they count as wrong
    categories: Mapping[str, tuple[float, int]]  # headline score and number of questions

    @property
    def main(self) -> Estimate:
        return self.scores[self.headline]


def score_suite(
    suite: Suite, questions: Sequence[Question], graded: Sequence[Sequence[Graded]], told: Sequence[Sequence[Response]]
) -> SuiteScore:
    """Scores of a suite.

    Args:
        graded, told: a row a question, an entry an answer.
    """
    headline = HEADLINE[suite.kind]
    everything = [one for row in graded for one in row]
    responses = [one for row in told for one in row]
    names = list(everything[0].scores)
    means = tuple(fmean(one.scores[headline] for one in row) for row in graded)
    by_category: dict[str, list[float]] = {}
    for question, mean in zip(questions, means, strict=True):
        by_category.setdefault(question.category, []).append(mean)
    return SuiteScore(
        suite=suite.name,
        num_questions=len(questions),
        num_samples=len(graded[0]),
        headline=headline,
        scores={
            name: estimate([[one.scores[name] for one in row] for row in graded], f"{suite.name}.{name}")
            for name in names
        },
        question_means=means,
        not_found_share=fmean(not one.is_found for one in everything),
        guessed=_guessed(questions, graded, headline) if suite.kind == "choice" else None,
        truncated_share=fmean(one.is_cut for one in responses),
        mean_tokens=fmean(one.num_tokens for one in responses),
        num_faults={name: sum(name in one.faults for one in everything) for name in names},
        categories={name: (fmean(found), len(found)) for name, found in sorted(by_category.items()) if name},
    )


def _guessed(questions: Sequence[Question], graded: Sequence[Sequence[Graded]], headline: str) -> float:
    return fmean(
        fmean(one.scores[headline] if one.is_found else 1 / len(question.options) for one in row)
        for question, row in zip(questions, graded, strict=True)
    )


def averages(scores: Mapping[str, SuiteScore]) -> dict[str, Estimate]:
    """The paper's averages (docs/evaluation.md) of those suites that are all there.

    `overall` is the mean of four numbers: the math average, SuperGPQA, BBEH and MMLU-Pro.
    """
    found = {
        name: average([(suite, scores[suite].question_means) for suite in members])
        for name, members in AVERAGES.items()
        if all(suite in scores for suite in members)
    }
    if all(suite in scores for suite in (*MATH, *GENERAL)):
        found[OVERALL] = _overall(scores)
    return found


def _overall(scores: Mapping[str, SuiteScore]) -> Estimate:
    draws = {name: resampled(scores[name].question_means, name) for name in (*MATH, *GENERAL)}
    math = np.mean([draws[name] for name in MATH], axis=0)
    whole = np.mean([math, *(draws[name] for name in GENERAL)], axis=0)
    mean = fmean([fmean(scores[name].main.mean for name in MATH), *(scores[name].main.mean for name in GENERAL)])
    low, high = np.quantile(whole, (0.025, 0.975))
    return Estimate(mean, float(low), float(high), "bootstrap over questions")


def sample_seed(seed: int, suite: str, question: str, sample: int) -> int:
    """Of one answer: a function of what it is, so that a suite cut short (`--limit`) has the same answers.

    >>> sample_seed(1, "gsm8k", "7", 0) == sample_seed(1, "gsm8k", "7", 0) != sample_seed(1, "gsm8k", "7", 1)
    True
    """
    return derive(seed, suite, question, sample)
