"""Which sequences share a micro-batch, and the micro-batch that they make. Sequences lie end to end, nothing is padded.

T packed tokens, S sequences. Samples are named by their index in the step's list.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from megatron_pz.batch.context import row_multiple, sequence_multiple
from megatron_pz.types import MicroBatch, Role

PADDING = -1
"""`MicroBatch.sample_indices` of a sequence that belongs to no sample."""
OWN_CHOICE = -1
"""`MicroBatch.routed_experts` of a token whose experts the trainer's own router chooses."""


def pack(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Bins of indices into `lengths`: each index once, each bin within `max_tokens` or of one index.

    Best-fit decreasing: the longest first, each into the bin with the least room that is enough. At most 11/9 of the
    fewest bins possible, and one more. Ties go by index and by the age of bins, so that equal lengths always pack alike.

    >>> pack([4, 9, 2, 6, 3], 8)
    [[1], [3, 2], [0, 4]]
    """
    bins: list[list[int]] = []
    open_bins: list[tuple[int, int]] = []  # room and place of those that the shortest fits into, by room
    shortest = min(lengths, default=0)
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(open_bins, (lengths[index], -1))
        if at == len(open_bins):
            room, place = max_tokens, len(bins)
            bins.append([])
        else:
            room, place = open_bins.pop(at)
        bins[place].append(index)
        if room - lengths[index] >= shortest:
            insort(open_bins, (room - lengths[index], place))
    return bins


def padded_length(length: int, context_size: int) -> int:
    """Tokens that a sequence takes in a row.

    >>> [padded_length(5, 1), padded_length(5, 2), padded_length(8, 2)]
    [5, 8, 8]
    """
    multiple = sequence_multiple(context_size)
    return -(-length // multiple) * multiple


class Packable(Protocol):
    """What is packed: a `Sample`, or what a rank is dealt of one (`batch.hand.Dealt`)."""

    @property
    def token_ids(self) -> Sequence[int] | np.ndarray:
        """Integers [length]; an array is int32."""
        ...

    @property
    def rollout_log_probs(self) -> Sequence[float] | np.ndarray:
        """Numbers [length]; an array is float32."""
        ...

    @property
    def advantage(self) -> float: ...

    @property
    def role(self) -> Role | None: ...

    @property
    def routed_experts(self) -> np.ndarray | None:
        """int16 [length - 1, layers, top_k], as `Sample` has them."""
        ...


def micro_batch(
    samples: Sequence[Packable] | Mapping[int, Packable],
    weights: Sequence[np.ndarray] | Mapping[int, np.ndarray],
    indices: Sequence[int],
    *,
    align: int = 1,
    context_size: int = 1,
) -> MicroBatch:
    """The samples `indices` packed in that order, then padding up to what the layout divides.

    What a sample says of its token t + 1 stands at position t, where that token is predicted. Without indices it is
    padding only, for a rank that has nothing to compute where others have.

    Args:
        samples: of the step, or of the rank, by index.
        weights: for each sample, its tokens' scaled loss weights, float32 [length].
        indices: of the samples that are packed.
        align: divisor of each context-parallel rank's tokens; the tensor-parallel size under sequence parallelism.
        context_size: context-parallel ranks; with several, each sequence ends in padding that makes it divisible.
    """
    chosen = [samples[index] for index in indices]
    lengths = [padded_length(len(sample.token_ids), context_size) for sample in chosen]
    multiple = row_multiple(context_size, align)
    padding = -sum(lengths) % multiple if chosen else multiple
    if padding:
        lengths.append(padding)
    total = sum(lengths)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    token_ids, labels, is_generator = np.zeros(total, np.int64), np.zeros(total, np.int64), np.zeros(total, np.bool_)
    loss_weights, advantages, log_probs = (np.zeros(total, np.float32) for _ in range(3))
    for start, index, sample in zip(starts.tolist(), indices, chosen, strict=False):
        end = start + len(sample.token_ids)
        predicted = slice(start, end - 1)
        token_ids[start:end] = sample.token_ids
        labels[predicted] = token_ids[start + 1 : end]
        loss_weights[predicted] = weights[index][1:]
        advantages[predicted] = sample.advantage
        log_probs[predicted] = sample.rollout_log_probs[1:]
        is_generator[predicted] = sample.role is Role.GENERATOR
    return MicroBatch(
        token_ids=token_ids,
        position_ids=np.concatenate([np.arange(length, dtype=np.int64) for length in lengths]),
        cu_seqlens=starts,
        labels=labels,
        loss_weights=loss_weights,
        advantages=advantages,
        rollout_log_probs=log_probs,
        is_generator=is_generator,
        sample_indices=(*indices, *((PADDING,) if padding else ())),
        routed_experts=_experts(chosen, starts),
    )


def _experts(chosen: Sequence[Packable], starts: np.ndarray) -> np.ndarray | None:
    """int16 [T, layers, top_k] of the samples that begin at `starts`, -1 where nothing is known; None where no sample knows.

    Unlike labels these speak of the token at t: it is this token that goes through the experts.
    """
    known = [sample.routed_experts for sample in chosen if sample.routed_experts is not None]
    if not known:
        return None
    filled = np.full((int(starts[-1]), *known[0].shape[1:]), OWN_CHOICE, np.int16)
    for start, sample in zip(starts, chosen, strict=False):
        if sample.routed_experts is not None:
            filled[start : start + len(sample.token_ids) - 1] = sample.routed_experts
    return filled
