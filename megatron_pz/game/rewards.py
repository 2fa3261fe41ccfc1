"""What each role is paid (paper Eq. 8 and 9), and what a control is paid in place of it."""

from __future__ import annotations

from collections.abc import Callable

from megatron_pz.game.answers import Match, matches, normalise

PredictionReward = Callable[[str | None, str, Match], float]
"""(answer as it was read or None, hidden text, how they are compared) -> reward."""


def prediction_reward(answer: str | None, target: str, match: Match = "strict") -> float:
    """Eq. 8: 1 where the prediction is the hidden text, else 0."""
    return 1.0 if matches(answer, target, match) else 0.0


def format_reward(answer: str | None, target: str, match: Match = "strict") -> float:
    r"""The format-only control: 1 for any answer that can be read, right or wrong; 0 for none or an empty box.

    >>> [format_reward(answer, "Paris") for answer in ("Paris", "Rome", r"\text{ }", None)]
    [1.0, 1.0, 0.0, 0.0]
    """
    return 1.0 if answer is not None and normalise(answer) else 0.0


def mask_reward(num_correct: int, num_predictions: int) -> float:
    """Eq. 9: one minus the predictions' mean accuracy, and 0 where nobody was right.

    The exception takes the prize off noise: a span that nobody can know earns as little as one that everybody knows.

    >>> [mask_reward(k, 8) for k in range(9)]
    [0.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0]
    """
    assert 0 <= num_correct <= num_predictions > 0, f"{num_correct} of {num_predictions} correct"
    return 0.0 if num_correct == 0 else 1.0 - num_correct / num_predictions


INVALID_MASK_REWARD = 0.0
"""Of a mask that cannot be hidden: no predictions are made, and it stays in its group (docs/paper.md 2.8, item 4)."""
