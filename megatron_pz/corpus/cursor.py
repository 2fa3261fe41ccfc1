"""The order in which the corpus is read: shuffled anew each epoch, and a pure function of (seed, position).

A run's place in the corpus is one integer, so that a resumed run reads on exactly where the first one stopped.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Cursor:
    """Indices of `num_items` items, each once an epoch, in an order of its own.

    >>> cursor = Cursor(num_items=5, seed=1)
    >>> sorted(cursor.take(0, 5)) == sorted(cursor.take(5, 5)) == [0, 1, 2, 3, 4]
    True
    >>> cursor.take(0, 3) + cursor.take(3, 9) == cursor.take(0, 12)
    True
    """

    num_items: int
    seed: int

    def __post_init__(self) -> None:
        assert self.num_items > 0, f"a cursor over {self.num_items} items"

    def take(self, position: int, n: int) -> list[int]:
        """Indices of the `n` draws from draw `position` (counted from 0 since the run began) on."""
        assert position >= 0 and n >= 0, f"position {position}, n {n}"
        return [
            int(_order(self.num_items, self.seed, draw // self.num_items)[draw % self.num_items])
            for draw in range(position, position + n)
        ]


@lru_cache(maxsize=4)
def _order(num_items: int, seed: int, epoch: int) -> np.ndarray:
    digest = hashlib.blake2b(f"{seed}/{epoch}/order".encode(), digest_size=4).digest()
    # RandomState, not default_rng: numpy promises that its stream never changes.
    return np.random.RandomState(int.from_bytes(digest, "big")).permutation(num_items)
