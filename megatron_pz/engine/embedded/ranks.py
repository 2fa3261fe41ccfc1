"""How the processes of one embedded engine talk: rank 0 asks, replicas answer, rank 0 gathers. Python objects, by gloo."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Any, Protocol

import torch.distributed as dist

from megatron_pz.engine.embedded.requests import replicas

WAIT = timedelta(days=7)
"""Followers wait while rank 0 plays; if rank 0 dies they learn it at once, from the closed connection."""


class Ranks(Protocol):
    """This rank among those that generate together."""

    rank: int
    replica: int  # index of the replica that this rank is part of
    num_replicas: int
    is_speaker: bool  # this rank tells rank 0 what its replica has sampled

    def broadcast(self, thing: Any) -> Any:
        """`thing` of rank 0, on every rank."""
        ...

    def gather(self, thing: Any) -> list[Any]:
        """Things of all ranks in rank order, on rank 0; empty elsewhere."""
        ...


class OneProcess:
    """Nobody to talk to."""

    rank, replica, num_replicas, is_speaker = 0, 0, 1, True

    def broadcast(self, thing: Any) -> Any:
        return thing

    def gather(self, thing: Any) -> list[Any]:
        return [thing]


class ProcessRanks:
    """All ranks of torch.distributed. Making one is collective.

    Args:
        partners: ranks that take part in this rank's forwards (tensor and expert parallel groups).
    """

    def __init__(self, partners: Iterable[int]) -> None:
        self.rank, self._size = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo", timeout=WAIT)
        found: list[Any] = [None] * self._size
        dist.all_gather_object(found, sorted({*partners, self.rank}), group=self._group)
        members = replicas(found)
        self.num_replicas = len(members)
        self.replica = next(index for index, ranks in enumerate(members) if self.rank in ranks)
        self.is_speaker = members[self.replica][0] == self.rank

    def broadcast(self, thing: Any) -> Any:
        box = [thing]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def gather(self, thing: Any) -> list[Any]:
        found: list[Any] | None = [None] * self._size if self.rank == 0 else None
        dist.gather_object(thing, found, dst=0, group=self._group)
        return found or []
