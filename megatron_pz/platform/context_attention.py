"""Packed attention where each sequence is shared out over context-parallel ranks: keys and values are gathered whole.

A rank has of every sequence two chunks of equal length, one from the front and one from the back (`batch.context`). Each
of its queries sees the keys before it, wherever they lie; gradients of keys and values go back to their ranks, summed.
Transformer Engine has its own way of doing this, with the same order of tokens.

Shapes: T tokens of the whole row, T / size of them on this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(query [b, heads, s, dim], key and value [b, heads, n, dim], mask bool [s, n]) -> [b, heads, s, dim]."""


@dataclass
class SharedSequences(PackedSeqParams):
    """Sequences of the whole row, of whose tokens this rank has a share."""

    positions: Tensor = None  # type: ignore[assignment]  # int64 [T / size], in its sequence, of each token of this rank
    gathered_places: Tensor = None  # type: ignore[assignment]  # int64 [T], see `batch.context.gathered_places`


def attend_shared(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: PackedSeqParams,
    runs: Sequence[tuple[int, int]],
    attend: Attend,
    group: Any,
) -> Tensor:
    """Attention output [T / size, heads * dim] of this rank's tokens, in the dtype of `query`.

    Args:
        query: [T / size, heads, dim]; key and value likewise, with their own heads.
        packed: a `SharedSequences`.
        runs: (number, length) of neighbours of one length in the whole row.
        attend: one product of attention.
        group: ranks that share the row.
    """
    assert isinstance(packed, SharedSequences), (
        "under context parallelism rows are packed by Platform.packed_seq_params"
    )
    size, rank = group.size(), group.rank()
    both = gather_from_sequence_parallel_region(torch.stack((key, value), 1), group=group)
    keys, values = both.index_select(0, packed.gathered_places).unbind(1)
    totals = [count * length for count, length in runs]
    outputs = []
    for (count, length), q, k, v in zip(
        runs, query.split([total // size for total in totals]), keys.split(totals), values.split(totals), strict=True
    ):
        q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in (q, k, v))
        chunk = length // (2 * size)
        halves = []
        for place, part in zip((rank, 2 * size - 1 - rank), q.split(chunk, 2), strict=True):
            seen = (place + 1) * chunk
            mask = torch.ones(chunk, seen, dtype=torch.bool, device=q.device).tril(seen - chunk)
            halves.append(attend(part, k[:, :, :seen], v[:, :, :seen], mask))
        outputs.append(torch.cat(halves, 2).transpose(1, 2).flatten(2).flatten(0, 1))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]
