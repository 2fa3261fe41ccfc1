"""A gather of pieces of unequal length, which NCCL has and gloo refuses.

Megatron-Core's token dispatcher asks for it where experts are cut by tensor parallelism and shared out over ranks: each
rank has other tokens to bring along. Here pieces are filled up to the longest. (The opposite, a reduce-scatter, gloo has.)
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather(stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`_gather_along_first_dim` that fills up: [sum of sizes, ...] from each rank's [its size, ...], of one dtype."""

    @functools.wraps(stock)
    def gathered(
        input_: Tensor, group: Any, output_split_sizes: Sequence[int] | None = None, use_global_buffer: bool = False
    ) -> Tensor:
        if output_split_sizes is None or group.size() == 1:
            return stock(input_, group, output_split_sizes, use_global_buffer)
        own = input_.new_zeros(max(output_split_sizes), *input_.shape[1:])
        own[: input_.shape[0]] = input_
        pieces = [torch.empty_like(own) for _ in output_split_sizes]
        dist.all_gather(pieces, own, group=group)
        return torch.cat([piece[:size] for piece, size in zip(pieces, output_split_sizes, strict=True)])

    return gathered


def probe() -> None:
    """Raise unless Megatron gathers 1 and 2 rows."""
    from megatron.core.tensor_parallel import mappings

    def one(rank: int, group: Any) -> bool:
        rows = torch.full((1 + rank, 2), float(rank))
        return mappings._gather_along_first_dim(rows, group, [1, 2])[:, 0].tolist() == [0.0, 1.0, 1.0]

    _on_two_ranks(one)


def _on_two_ranks(check: Callable[[int, Any], bool]) -> None:
    """Run `check` on two gloo ranks, threads of this process.

    Raises:
        RuntimeError: it was false on one, or raised.
    """
    store = dist.HashStore()
    said: dict[int, str] = {}

    def rank_main(rank: int) -> None:
        try:
            said[rank] = (
                ""
                if check(rank, dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=20)))
                else "has something else"
            )
        except (RuntimeError, ValueError) as error:
            said[rank] = str(error)

    threads = [threading.Thread(target=rank_main, args=(rank,), daemon=True) for rank in range(2)]
    stock_device = torch.cuda.current_device
    # Of no account here: gloo is asked, not CUDA.
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    finally:
        torch.cuda.current_device = stock_device
    if said != {0: "", 1: ""}:
        raise RuntimeError(f"ranks say {said}")
