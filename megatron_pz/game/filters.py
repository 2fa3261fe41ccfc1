"""Which groups teach something."""

from __future__ import annotations

from collections.abc import Sequence


def is_informative(rewards: Sequence[float]) -> bool:
    """True where the rewards of a group differ.

    For predictions this drops groups that are all wrong or all right; for masks, groups of equal rewards. A single mask
    that earned 0 stays in its group: it is what says "too easy" or "unanswerable" (docs/paper.md 2.8, items 6 and 7).

    >>> is_informative([0, 0, 1]), is_informative([1, 1, 1]), is_informative([])
    (True, False, False)
    """
    return len(set(rewards)) > 1
