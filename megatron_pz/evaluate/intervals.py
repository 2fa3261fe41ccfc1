"""Confidence intervals, 95%, in shares.

One answer a question: Wilson's score interval. Several: a percentile bootstrap **over questions**, since answers to one question
are not independent; the draws have a seed of their own, so that the same answers have the same interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from megatron_pz.evaluate.fixed_masks import wilson_interval
from megatron_pz.game.seeds import derive

NUM_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its interval, and how that was found."""

    mean: float
    low: float
    high: float
    method: str


def estimate(by_question: Sequence[Sequence[float]], name: str) -> Estimate:
    """The mean over questions of the mean over a question's answers.

    Args:
        by_question: scores in [0, 1]: a row a question, a column an answer; at least one of each.
        name: seeds the bootstrap.

    >>> found = estimate([[1.0]] * 20 + [[0.0]] * 80, "x")
    >>> found.mean, round(found.low, 3), round(found.high, 3), found.method
    (0.2, 0.133, 0.289, 'wilson')
    """
    means = [fmean(row) for row in by_question]
    mean = fmean(means)
    if all(len(row) == 1 and row[0] in (0.0, 1.0) for row in by_question):
        low, high = wilson_interval(sum(means), len(means))
        return Estimate(mean, low, high, "wilson")
    return Estimate(mean, *_quantiles(resampled(means, name)), "bootstrap over questions")


def average(suites: Sequence[tuple[str, Sequence[float]]]) -> Estimate:
    """The plain mean of several suites' means, each suite's questions drawn anew by themselves.

    Args:
        suites: (name, mean score of each question).
    """
    draws = np.mean([resampled(means, name) for name, means in suites], axis=0)
    return Estimate(fmean(fmean(means) for _, means in suites), *_quantiles(draws), "bootstrap over questions")


def resampled(means: Sequence[float], name: str) -> np.ndarray:
    """float64 [NUM_RESAMPLES]: the mean of as many questions, drawn with replacement."""
    generator = np.random.default_rng(derive("bootstrap", name))
    values, size = np.asarray(means, dtype=np.float64), len(means)
    return np.array([values[generator.integers(0, size, size)].mean() for _ in range(NUM_RESAMPLES)])


def _quantiles(draws: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(low), float(high)
