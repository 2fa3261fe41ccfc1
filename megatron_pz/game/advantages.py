"""A reward against its group (paper Eq. 10)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def advantages(rewards: Sequence[float], eps: float = 1e-6) -> tuple[float, ...]:
    """(reward - mean) / (std + eps) with the unbiased standard deviation; all 0 where the rewards are equal.

    >>> [round(a, 4) for a in advantages([1.0, 0.0, 0.0, 1.0])]
    [0.866, -0.866, -0.866, 0.866]
    """
    if len(set(rewards)) < 2:
        return (0.0,) * len(rewards)  # exactly, whatever rounding the mean would bring in
    mean, std = statistics.fmean(rewards), statistics.stdev(rewards)
    return tuple((reward - mean) / (std + eps) for reward in rewards)
