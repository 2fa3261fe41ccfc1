"""Which sequences share a micro-batch, and the micro-batch that they make. Sequences lie end to end, nothing is padded.

T packed tokens, S sequences. Samples are named by their index in the step's list.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from megatron_pz.batch.context import row_multiple, sequence_multiple
from megatron_pz.types import MicroBatch, Role, Sample

PADDING = -1
"""`MicroBatch.sample_indices` of a sequence that belongs to no sample."""
OWN_CHOICE = -1
"""`MicroBatch.routed_experts` of a token whose experts the trainer's own router chooses."""


def pack(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Bins of indices into `lengths`: each index once, each bin within `max_tokens` or of one index.

    First-fit decreasing: the longest first, each into the first bin that has room. At most 11/9 of the fewest bins
    possible, and one more. Ties go by index, so that equal lengths always pack alike.

    >>> pack([4, 9, 2, 6, 3], 8)
    [[1], [3, 2], [0, 4]]
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = next((b for b, left in enumerate(room) if lengths[index] <= left), None)
        if place is None:
            bins.append([index])
            room.append(max_tokens - lengths[index])
        else:
            bins[place].append(index)
            room[place] -= lengths[index]
    return bins


def padded_length(length: int, context_size: int) -> int:
    """Tokens that a sequence takes in a row.

    >>> [padded_length(5, 1), padded_length(5, 2), padded_length(8, 2)]
    [5, 8, 8]
    """
    multiple = sequence_multiple(context_size)
    return -(-length // multiple) * multiple


def micro_batch(
    samples: Sequence[Sample],
    weights: Sequence[np.ndarray],
    indices: Sequence[int],
    *,
    align: int = 1,
    context_size: int = 1,
) -> MicroBatch:
    """The samples `indices` packed in that order, then padding up to what the layout divides.

    What a sample says of its token t + 1 stands at position t, where that token is predicted. Without indices it is
    padding only, for a rank that has nothing to compute where others have.

    Args:
        samples: of the step.
        weights: for each sample, its tokens' scaled loss weights, float64.
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

    def row(dtype: Any, parts: Iterable[Any]) -> np.ndarray:
        """The parts at their sequences' places, zeros elsewhere."""
        filled: np.ndarray = np.zeros(total, dtype)
        for start, part in zip(starts, parts, strict=False):
            filled[start : start + len(part)] = part
        return filled

    return MicroBatch(
        token_ids=row(np.int64, [sample.token_ids for sample in chosen]),
        position_ids=np.concatenate([np.arange(length, dtype=np.int64) for length in lengths]),
        cu_seqlens=starts,
        labels=row(np.int64, [sample.token_ids[1:] for sample in chosen]),
        loss_weights=row(np.float32, [weights[index][1:] for index in indices]),
        advantages=row(np.float32, [[sample.advantage] * (len(sample.token_ids) - 1) for sample in chosen]),
        rollout_log_probs=row(np.float32, [sample.rollout_log_probs[1:] for sample in chosen]),
        is_generator=row(
            np.bool_, [[sample.role is Role.GENERATOR] * (len(sample.token_ids) - 1) for sample in chosen]
        ),
        sample_indices=(*indices, *((PADDING,) if padding else ())),
        routed_experts=_experts(chosen, starts),
    )


def _experts(chosen: Sequence[Sample], starts: np.ndarray) -> np.ndarray | None:
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
