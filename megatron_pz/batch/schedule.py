"""The micro-batches of one update, for every data-parallel rank, with the loss weights of the whole step.

1. Every sample is in one micro-batch of one rank.
2. Ranks have equally many micro-batches and, as far as samples can be dealt, equally many tokens; the i-th
   micro-batches of all ranks are of like size, since ranks that share experts wait for each other in each.
3. Loss weights add up to `UpdatePlan.num_tokens`, so that dividing the sum of weighted losses by the count of trained
   tokens gives the mean that was asked for, however the samples are packed and dealt (docs/decisions/0001).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Literal

import numpy as np

from megatron_pz.batch.packing import micro_batch, pack, padded_length
from megatron_pz.types import Sample, UpdatePlan


def plan_update(
    samples: Sequence[Sample],
    *,
    max_tokens: int,
    dp_size: int = 1,
    loss_aggregation: Literal["token_mean", "sequence_mean"] = "token_mean",
    align: int = 1,
    context_size: int = 1,
    count_multiple: int = 1,
) -> UpdatePlan:
    """Micro-batches of one update.

    Args:
        samples: of the update; without any, a plan of no micro-batch and no token.
        max_tokens: budget of a micro-batch in tokens, alignment left aside; a longer sample goes alone.
        dp_size: data-parallel ranks.
        loss_aggregation: `token_mean`: the mean of all trained tokens' losses, each with its own weight;
            `sequence_mean`: the mean over sequences of the mean over their trained tokens, each sequence with the mean
            of its tokens' weights.
        align: every rank's tokens of a micro-batch are a multiple of this.
        context_size: context-parallel ranks, which share each micro-batch.
        count_multiple: the number of micro-batches is a multiple of this, as interleaved pipeline stages need it.
    """
    if not samples:
        return UpdatePlan(((),) * dp_size, 0, 0)
    weights, num_tokens = scaled_weights(samples, loss_aggregation)
    lengths = [padded_length(len(sample.token_ids), context_size) for sample in samples]
    bins_of = []
    for hand in deal_evenly(lengths, dp_size):
        packed = pack([lengths[index] for index in hand], max_tokens)
        bins_of.append([[hand[place] for place in places] for places in packed])
    most = max(len(bins) for bins in bins_of)
    num_micro_batches = -(-most // count_multiple) * count_multiple
    return UpdatePlan(
        micro_batches=tuple(
            tuple(
                micro_batch(samples, weights, indices, align=align, context_size=context_size)
                for indices in _spread(bins, num_micro_batches, lengths)
            )
            for bins in bins_of
        ),
        num_tokens=num_tokens,
        num_samples=len(samples),
    )


def scaled_weights(
    samples: Sequence[Sample], loss_aggregation: Literal["token_mean", "sequence_mean"]
) -> tuple[list[np.ndarray], int]:
    """Each sample's loss weights, float64, scaled to add up to the number of trained tokens, and that number.

    A sequence's first token is not trained, whatever its weight: nothing predicts it.

    >>> short = Sample((5, 6), (0, 1), (0, 0), 1.0, None, "a")
    >>> long = Sample((5, 6, 7, 8), (0, 1, 1, 1), (0, 0, 0, 0), 1.0, None, "b")
    >>> [list(map(float, w)) for w in scaled_weights([short, long], "sequence_mean")[0]]
    [[0.0, 2.0], [0.0, 0.6666666666666666, 0.6666666666666666, 0.6666666666666666]]
    """
    raw = [np.array((0.0, *sample.loss_weights[1:]), np.float64) for sample in samples]
    counts = [int(np.count_nonzero(weights)) for weights in raw]
    num_tokens = sum(counts)
    if loss_aggregation == "sequence_mean":
        raw = [weights / max(count, 1) for weights, count in zip(raw, counts, strict=True)]
    total = sum(float(weights.sum()) for weights in raw)
    return [weights * (num_tokens / total) if total else weights for weights in raw], num_tokens


def deal_evenly(lengths: Sequence[int], num_hands: int) -> list[list[int]]:
    """Indices into `lengths` dealt to hands: the longest first, each to the hand that has the fewest tokens.

    >>> deal_evenly([4, 9, 2, 6, 3], 2)
    [[1, 4], [3, 0, 2]]
    """
    hands: list[list[int]] = [[] for _ in range(num_hands)]
    fewest = [(0, hand) for hand in range(num_hands)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        tokens, hand = heapq.heappop(fewest)
        hands[hand].append(index)
        heapq.heappush(fewest, (tokens + lengths[index], hand))
    return hands


def _spread(bins: list[list[int]], num_bins: int, lengths: Sequence[int]) -> list[list[int]]:
    """`num_bins` bins, the largest first: large ones are halved till there are enough, then empty ones added."""

    def size(indices: Sequence[int]) -> int:
        return sum(lengths[index] for index in indices)

    spread = list(bins)
    while len(spread) < num_bins and any(len(indices) > 1 for indices in spread):
        divisible = max((indices for indices in spread if len(indices) > 1), key=size)
        spread.remove(divisible)
        local = [lengths[index] for index in divisible]
        spread += [[divisible[place] for place in half] for half in deal_evenly(local, 2)]
    spread += [[] for _ in range(num_bins - len(spread))]
    return sorted(spread, key=size, reverse=True)
