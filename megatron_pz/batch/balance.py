"""Which samples each data-parallel rank computes together: equal work for all ranks, as few micro-batches as there can be.

What a sequence of n tokens takes is `Cost.token * n + Cost.pair * n * n`: products with weights, and attention.

1. Every rank has equally many micro-batches, and the fewest for which a packing is found.
2. Ranks have equal work, and so have the i-th micro-batches of all ranks: ranks that share experts wait for each other in
   each.
3. Within that the token budget holds; a longer sample goes alone.

Two aims pull at each other where the budget is tight: bins of equal work must leave each other room, bins that are full
cannot choose. So the longer samples are dealt by work and the rest where they fit best, with as many dealt by work as
will do; swaps between the micro-batches that wait for each other do the rest.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_pz.batch.packing import pack

SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)
"""Of the samples, longest first, that are dealt by work; the first that leaves room for the rest is taken."""
TIGHT_SHARE = 0.5
"""The one with which fewer micro-batches than by best fit are tried, which seldom works."""
LOOKS = 16
"""Bins that have the least work and are looked at for room."""
LEVEL = 0.005
"""Share of the mean by which the work of micro-batches that wait for each other may differ without a swap being sought."""
Bins = list[list[int]]


@dataclass(frozen=True, slots=True)
class Cost:
    """Work of a sequence, in any unit. Example: `Cost(6.6e9, 3.9e5)`, FLOPs of Qwen3-30B-A3B's forward."""

    token: float = 1.0
    pair: float = 0.0

    def of(self, length: int) -> float:
        """Of `length` tokens.

        >>> Cost(2.0, 0.5).of(10)
        70.0
        """
        return (self.token + self.pair * length) * length


BY_TOKENS = Cost()


@dataclass(frozen=True, slots=True)
class Balance:
    """How well a plan fills its budget and shares its work. All are shares; 0 is perfect."""

    waste: float  # of the token budget of all micro-batches
    imbalance: float  # most work of a rank over the mean, less 1
    waiting: float  # the same where ranks wait for each other in each micro-batch
    worst_row: float  # the same of the i-th micro-batches where it is largest


def share_out(
    lengths: Sequence[int], *, max_tokens: int, dp_size: int = 1, cost: Cost = BY_TOKENS, count_multiple: int = 1
) -> list[Bins]:
    """Indices into `lengths`, by data-parallel rank and micro-batch. A micro-batch may be empty.

    Args:
        lengths: tokens of each sample, as packed.
        max_tokens: budget of a micro-batch.
        count_multiple: the number of micro-batches of a rank is a multiple of this.

    >>> share_out([4, 9, 2, 6, 3], max_tokens=12, dp_size=2)
    [[[1, 4]], [[3, 0, 2]]]
    """
    if not lengths:
        return [[] for _ in range(dp_size)]
    work = [cost.of(length) for length in lengths]
    bins = _bins(lengths, work, max_tokens, dp_size * count_multiple)
    bins.sort(key=lambda indices: -_sum(work, indices))
    ranks: list[Bins] = [[] for _ in range(dp_size)]
    totals = [0.0] * dp_size
    for start in range(0, len(bins), dp_size):
        row = bins[start : start + dp_size]
        _level(row, lengths, work, max_tokens)
        row.sort(key=lambda indices: -_sum(work, indices))
        for indices, rank in zip(row, sorted(range(dp_size), key=totals.__getitem__), strict=True):
            ranks[rank].append(indices)
            totals[rank] += _sum(work, indices)
    _level_ranks(ranks, lengths, work, max_tokens)
    return ranks


def balance(ranks: Sequence[Bins], lengths: Sequence[int], max_tokens: int, cost: Cost = BY_TOKENS) -> Balance:
    """Of what `share_out` gave."""
    rows = [[sum(cost.of(lengths[index]) for index in indices) for indices in row] for row in zip(*ranks, strict=True)]
    if not rows:
        return Balance(0.0, 0.0, 0.0, 0.0)
    mean = sum(map(sum, rows)) / len(ranks)
    tokens = sum(lengths[index] for bins in ranks for indices in bins for index in indices)
    return Balance(
        waste=1 - tokens / (len(rows) * len(ranks) * max_tokens),
        imbalance=max(map(sum, zip(*rows, strict=True))) / mean - 1,
        waiting=sum(map(max, rows)) / mean - 1,
        worst_row=max(max(row) * len(row) / sum(row) for row in rows if sum(row)) - 1,
    )


def least(
    lengths: Sequence[int], max_tokens: int, dp_size: int, cost: Cost = BY_TOKENS, count_multiple: int = 1
) -> tuple[int, float, float]:
    """What no packing of these lengths can be below: micro-batches of a rank, share of the budget that is wasted, and
    imbalance over ranks (so few samples cannot be dealt evenly).

    >>> least([9, 9, 9, 9, 9], 10, 2)
    (3, 0.25, 0.19999999999999996)
    """
    together = [length for length in lengths if length <= max_tokens]
    halves = sum(2 * length > max_tokens for length in together)  # no two of them fit one bin
    num_bins = len(lengths) - len(together) + max(halves, -(-sum(together) // max_tokens))
    count = -(-num_bins // (dp_size * count_multiple)) * count_multiple
    work = sorted((cost.of(length) for length in lengths), reverse=True)
    mean = sum(work) / dp_size
    # Some rank has the costliest, some two of the dp_size + 1 costliest, some as many samples as there are a rank.
    two = work[dp_size - 1] + work[dp_size] if len(work) > dp_size else 0.0
    forced = max(work[0], two, sum(work[len(work) - -(-len(work) // dp_size) :]))
    return count, 1 - sum(lengths) / (count * dp_size * max_tokens), max(0.0, forced / mean - 1)


def _bins(lengths: Sequence[int], work: Sequence[float], max_tokens: int, multiple: int) -> Bins:
    """A multiple of `multiple` bins, of equal work as far as they go."""
    packed = pack(lengths, max_tokens)
    most = -(-len(packed) // multiple) * multiple
    fewest = -(-least(lengths, max_tokens, 1)[0] // multiple) * multiple
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    tight: Bins | None = None
    while fewest < most:  # by halves: a few attempts however many samples there are
        num_bins = fewest + (most - fewest) // multiple // 2 * multiple
        found = _dealt(order, lengths, work, max_tokens, num_bins, TIGHT_SHARE)
        tight, fewest, most = (tight, num_bins + multiple, most) if found is None else (found, fewest, num_bins)
    if tight is not None or most == 1:
        return tight or packed
    if (found := _dealt(order, lengths, work, max_tokens, most, SHARES[0])) is not None:
        return found
    below, above, best = 0, len(SHARES) - 1, None  # a smaller share leaves more room
    while above - below > 1:
        middle = (below + above) // 2
        found = _dealt(order, lengths, work, max_tokens, most, SHARES[middle])
        below, above, best = (below, middle, found) if found is not None else (middle, above, best)
    return best or packed + [[] for _ in range(most - len(packed))]


def _dealt(
    order: Sequence[int], lengths: Sequence[int], work: Sequence[float], max_tokens: int, num_bins: int, share: float
) -> Bins | None:
    """`num_bins` bins: the first `share` of `order` each to the bin of least work that has room, the others each to the
    bin with the least room that is enough. None where one has no room."""
    bins: Bins = [[] for _ in range(num_bins)]
    room, total, shortest = [max_tokens] * num_bins, [0.0] * num_bins, lengths[order[-1]]
    cheapest = [(0.0, place) for place in range(num_bins)]
    split = round(share * len(order))
    for index in order[:split]:
        full: list[tuple[float, int]] = []
        while cheapest and len(full) < LOOKS:
            place = cheapest[0][1]
            if lengths[index] <= room[place] or not bins[place]:
                break
            found = heapq.heappop(cheapest)
            if room[place] >= shortest:  # else it is closed
                full.append(found)
        else:
            return None
        bins[place].append(index)
        room[place] -= lengths[index]
        total[place] += work[index]
        heapq.heapreplace(cheapest, (total[place], place))
        for found in full:
            heapq.heappush(cheapest, found)
    rooms = sorted((left, place) for place, left in enumerate(room) if left >= shortest or not bins[place])
    for index in order[split:]:
        at = bisect_left(rooms, (lengths[index], -1))
        if at == len(rooms):
            if not rooms or bins[rooms[-1][1]]:
                return None
            at -= 1  # longer than the budget, into an empty bin
        left, place = rooms.pop(at)
        bins[place].append(index)
        if left - lengths[index] >= shortest:
            insort(rooms, (left - lengths[index], place))
    return bins


def _level(row: Bins, lengths: Sequence[int], work: Sequence[float], max_tokens: int) -> None:
    """Bring the bins' work closer: while it helps, the costliest exchanges samples with one of the cheapest."""
    totals = [_sum(work, indices) for indices in row]
    mean = sum(totals) / len(row)
    for _ in range(8 * len(row)):
        high = max(range(len(row)), key=totals.__getitem__)
        for low in heapq.nsmallest(LOOKS, range(len(row)), key=totals.__getitem__):
            gap = totals[high] - totals[low]
            if gap <= LEVEL * mean:
                return
            if _exchange(row[high], row[low], gap, lengths, work, max_tokens):
                break
        else:
            return
        totals[high], totals[low] = _sum(work, row[high]), _sum(work, row[low])


def _level_ranks(ranks: Sequence[Bins], lengths: Sequence[int], work: Sequence[float], max_tokens: int) -> None:
    """The same for whole ranks, by their i-th micro-batches, smallest first: where a sample is as long as all else that
    fits a micro-batch, equal ones are not enough."""
    totals = [sum(_sum(work, indices) for indices in bins) for bins in ranks]
    mean = sum(totals) / len(ranks)
    for _ in range(8 * len(lengths)):
        high, low = max(range(len(ranks)), key=totals.__getitem__), min(range(len(ranks)), key=totals.__getitem__)
        gap = totals[high] - totals[low]
        if gap <= LEVEL * mean:
            return
        pairs = zip(reversed(ranks[high]), reversed(ranks[low]), strict=True)
        if not any(_exchange(more, less, gap, lengths, work, max_tokens) for more, less in pairs):
            return
        totals[high], totals[low] = (sum(_sum(work, indices) for indices in ranks[rank]) for rank in (high, low))


def _exchange(
    high: list[int], low: list[int], gap: float, lengths: Sequence[int], work: Sequence[float], max_tokens: int
) -> bool:
    """Whether a sample of `high` went to `low`, perhaps for another, and brought what is `gap` apart closer: the one by
    which half of `gap` moves as nearly as can be."""
    best: tuple[int, int | None] | None = None
    nearest = 0.49 * gap  # no less than a fiftieth of the gap, so that it comes to an end
    room = [max_tokens - _sum(lengths, indices) for indices in (high, low)]
    for given in high:
        for taken in (None, *low):
            off = abs(work[given] - (0.0 if taken is None else work[taken]) - gap / 2)
            longer = lengths[given] - (0 if taken is None else lengths[taken])
            if off < nearest and -room[0] <= longer <= room[1]:
                best, nearest = (given, taken), off
    if best is None:
        return False
    given, taken = best
    high.remove(given)
    low.append(given)
    if taken is not None:
        low.remove(taken)
        high.append(taken)
    return True


def _sum(values: Sequence[float], indices: Sequence[int]) -> float:
    return sum(values[index] for index in indices)
