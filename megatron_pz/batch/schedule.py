"""The micro-batches of one update, for every data-parallel rank, with the loss weights of the whole step.

1. Every sample is in one micro-batch of one rank.
2. Ranks have equally many micro-batches, and as far as samples can be dealt equal work (batch/balance.py).
3. Loss weights add up to `UpdatePlan.num_tokens`, so that dividing the sum of weighted losses by the count of trained
   tokens gives the mean that was asked for, however the samples are packed and dealt (docs/decisions/0001).
4. What a rank needs is its `Hand`; the micro-batches are made from that alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from megatron_pz.batch.balance import BY_TOKENS, Cost, share_out
from megatron_pz.batch.hand import Hand, dealt
from megatron_pz.batch.packing import padded_length
from megatron_pz.types import Sample, UpdatePlan

LossAggregation = Literal["token_mean", "sequence_mean"]


def plan_update(
    samples: Sequence[Sample],
    *,
    max_tokens: int,
    dp_size: int = 1,
    loss_aggregation: LossAggregation = "token_mean",
    align: int = 1,
    context_size: int = 1,
    count_multiple: int = 1,
    cost: Cost = BY_TOKENS,
) -> UpdatePlan:
    """Micro-batches of one update, of all ranks.

    Args:
        align: every rank's tokens of a micro-batch are a multiple of this.
        The rest as for `hands`.
    """
    dealt_out = hands(
        samples,
        max_tokens=max_tokens,
        dp_size=dp_size,
        loss_aggregation=loss_aggregation,
        context_size=context_size,
        count_multiple=count_multiple,
        cost=cost,
    )
    return UpdatePlan(
        micro_batches=tuple(hand.micro_batches(align=align, context_size=context_size) for hand in dealt_out),
        num_tokens=dealt_out[0].num_tokens,
        num_samples=len(samples),
    )


def hands(
    samples: Sequence[Sample],
    *,
    max_tokens: int,
    dp_size: int = 1,
    loss_aggregation: LossAggregation = "token_mean",
    context_size: int = 1,
    count_multiple: int = 1,
    cost: Cost = BY_TOKENS,
) -> list[Hand]:
    """What each data-parallel rank is dealt of one update.

    Args:
        samples: of the update; without any, hands of no micro-batch.
        max_tokens: budget of a micro-batch in tokens, alignment left aside; a longer sample goes alone.
        dp_size: data-parallel ranks.
        loss_aggregation: `token_mean`: the mean of all trained tokens' losses, each with its own weight;
            `sequence_mean`: the mean over sequences of the mean over their trained tokens, each sequence with the mean
            of its tokens' weights.
        context_size: context-parallel ranks, which share each micro-batch.
        count_multiple: the number of micro-batches is a multiple of this, as interleaved pipeline stages need it.
        cost: by which ranks are given equal work.
    """
    scales, num_tokens = scales_of(samples, loss_aggregation)
    lengths = [padded_length(len(sample.token_ids), context_size) for sample in samples]
    ranks = share_out(lengths, max_tokens=max_tokens, dp_size=dp_size, cost=cost, count_multiple=count_multiple)
    return [
        Hand(
            samples={index: dealt(samples[index], scales[index]) for indices in bins for index in indices},
            bins=tuple(tuple(indices) for indices in bins),
            num_tokens=num_tokens,
            num_samples=len(samples),
            dp_rank=dp_rank,
            dp_size=dp_size,
        )
        for dp_rank, bins in enumerate(ranks)
    ]


def scales_of(samples: Sequence[Sample], loss_aggregation: LossAggregation) -> tuple[list[float], int]:
    """For each sample what its tokens' loss weights are multiplied with, so that all add up to the number of trained
    tokens, and that number.

    A sequence's first token is not trained, whatever its weight: nothing predicts it.

    >>> short = Sample((5, 6), (0, 1), (0, 0), 1.0, None, "a")
    >>> long = Sample((5, 6, 7, 8), (0, 1, 1, 1), (0, 0, 0, 0), 1.0, None, "b")
    >>> scales_of([short, long], "sequence_mean")
    ([2.0, 0.6666666666666666], 4)
    """
    # By tuple methods: a step has more tokens than arrays can be made of in passing.
    firsts = [sample.loss_weights[:1] for sample in samples]
    counts = [
        len(sample.loss_weights) - sample.loss_weights.count(0) - sum(weight != 0 for weight in first)
        for sample, first in zip(samples, firsts, strict=True)
    ]
    totals = [sum(sample.loss_weights[1:]) for sample in samples]
    num_tokens = sum(counts)
    own = [1.0 if loss_aggregation == "token_mean" else 1 / max(count, 1) for count in counts]
    whole = sum(scale * total for scale, total in zip(own, totals, strict=True))
    return [scale * (num_tokens / whole) if whole else scale for scale in own], num_tokens
