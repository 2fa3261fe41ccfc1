"""Each sequence of a packed row shared out over context-parallel ranks, and put together again.

A sequence is cut into 2 * size chunks of equal length, of which a rank takes the one at its own place from the front and
the one at its own place from the back ("zig-zag"): a chunk far back attends to more keys than one in front, and so every
rank has the same work. Sequences are padded to a multiple of 2 * size tokens when they are packed.

Source: Megatron-Core's and Transformer Engine's order of tokens, which `tex.thd_get_partitioned_indices` gives.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from megatron_pz.types import MicroBatch

PER_SEQUENCE = ("cu_seqlens", "sample_indices")
"""Fields of `MicroBatch` that do not speak of tokens."""


def sequence_multiple(size: int) -> int:
    """What every sequence's length is a multiple of.

    >>> [sequence_multiple(size) for size in (1, 2, 4)]
    [1, 4, 8]
    """
    return 2 * size if size > 1 else 1


def row_multiple(size: int, align: int) -> int:
    """What the tokens of a row are a multiple of, so that every rank's share is one of `align` and padding can be shared.

    >>> [row_multiple(1, 3), row_multiple(2, 1), row_multiple(2, 3), row_multiple(2, 4)]
    [3, 4, 12, 8]
    """
    return size * math.lcm(2, align) if size > 1 else align


def places(cu_seqlens: np.ndarray, size: int, rank: int) -> np.ndarray:
    """Where in the whole row this rank's tokens stand: int64 [T / size], in the order in which it has them.

    Args:
        cu_seqlens: int [S + 1], cumulative lengths, each length a multiple of `sequence_multiple(size)`.
        size: ranks that share the row.
        rank: among them.

    >>> places(np.array([0, 4, 12]), 2, 0).tolist()
    [0, 3, 4, 5, 10, 11]
    >>> places(np.array([0, 4, 12]), 2, 1).tolist()
    [1, 2, 6, 7, 8, 9]
    """
    starts = np.asarray(cu_seqlens, np.int64)
    if size == 1:
        return np.arange(starts[-1])
    chunks = np.diff(starts) // (2 * size)
    # Of each sequence two runs of one chunk: the first token of either, and how many there are.
    firsts = np.stack([starts[:-1] + rank * chunks, starts[:-1] + (2 * size - 1 - rank) * chunks], 1).ravel()
    lengths = np.repeat(chunks, 2)
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.repeat(firsts, lengths) + within


def gathered_places(cu_seqlens: np.ndarray, size: int) -> np.ndarray:
    """Where each token of the whole row stands when all ranks' shares lie end to end: int64 [T].

    >>> gathered_places(np.array([0, 4]), 2).tolist()
    [0, 2, 3, 1]
    """
    return np.argsort(np.concatenate([places(cu_seqlens, size, rank) for rank in range(size)]))


def share(batch: MicroBatch, size: int, rank: int) -> MicroBatch:
    """This rank's tokens of a micro-batch. `cu_seqlens` stays that of the whole row, as attention wants it."""
    if size == 1:
        return batch
    mine = places(batch.cu_seqlens, size, rank)
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    per_token = {name: value for name, value in values.items() if name not in PER_SEQUENCE and value is not None}
    return dataclasses.replace(batch, **{name: value[mine] for name, value in per_token.items()})


def whole(shares: Sequence[np.ndarray], cu_seqlens: np.ndarray) -> np.ndarray:
    """One value a token, [T, ...], from every rank's [T / size, ...]; the dtype is kept.

    >>> whole([np.array([10, 13]), np.array([11, 12])], np.array([0, 4])).tolist()
    [10, 11, 12, 13]
    """
    return np.concatenate(list(shares))[gathered_places(cu_seqlens, len(shares))]
