"""N-grams of words shared with evaluation sets, and the keys by which texts count as equal."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np

from megatron_pz.words import words

_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def text_keys(text: str) -> tuple[int, int]:
    """Two 64-bit keys. The first is equal for texts that differ by case, punctuation, white space or compatibility forms
    alone; the second also where digits differ (texts that a program filled in)."""
    letters = "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if c.isalnum())
    return _hash(letters), _hash(re.sub(r"\d+", "0", letters))


def gram_hashes(text: str, n: int) -> np.ndarray:
    """uint64 [words - n + 1]: one a run of `n` words, case and compatibility forms folded; empty for shorter texts.

    >>> len(gram_hashes("one two three", 2)), len(gram_hashes("東京都", 3))
    (2, 1)
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    hashes = np.array([_word_hash(folded[a:b]) for a, b in words(folded)], dtype=np.uint64)
    if len(hashes) < n:
        return np.empty(0, dtype=np.uint64)
    total = np.zeros(len(hashes) - n + 1, dtype=np.uint64)
    for place in range(n):
        total = total * _FACTOR + hashes[place : place + len(total)]
    return total


def forbidden_grams(texts: Iterable[str], n: int) -> tuple[np.ndarray, int]:
    """Sorted distinct n-grams of `texts`, uint64 [grams], and how many texts are too short to have one."""
    found = [gram_hashes(text, n) for text in texts]
    short = sum(not len(hashes) for hashes in found)
    return np.unique(np.concatenate([np.empty(0, dtype=np.uint64), *found])), short


def shares_gram(text: str, forbidden: np.ndarray, n: int) -> bool:
    """True where a run of `n` words of `text` is in `forbidden`, sorted uint64 [grams]."""
    if not len(forbidden):
        return False
    hashes = gram_hashes(text, n)
    places = np.searchsorted(forbidden, hashes)
    return bool(np.any(forbidden[np.minimum(places, len(forbidden) - 1)] == hashes))


def is_first(keys: Sequence[int] | np.ndarray) -> np.ndarray:
    """bool [n]: where a key stands for the first time."""
    array = np.asarray(keys, dtype=np.uint64)
    first = np.zeros(len(array), dtype=bool)
    first[np.unique(array, return_index=True)[1]] = True
    return first


@lru_cache(maxsize=1 << 16)
def _word_hash(word: str) -> int:
    return _hash(word)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")
