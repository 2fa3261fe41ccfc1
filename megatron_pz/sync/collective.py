"""Weights by collective: each pipeline stage's first rank broadcasts its tensors to all servers.

    stage 0: ranks 0..3 ─ gather ─▶ rank 0 ─┐ broadcast (NCCL; gloo on CPU)
    stage 1: ranks 4..7 ─ gather ─▶ rank 4 ─┴▶ servers              rank 0 tells the servers by HTTP what comes

1. A stage and the servers are one process group; it is made anew when a server came or went.
2. A bucket is one broadcast of bytes. Its names, dtypes and shapes travel by HTTP, always from rank 0.
3. Nothing is broadcast before every server has said that it takes tensors; a server that goes away in the middle ends the
   push for all servers of the group, after `timeout_s` at the latest, and all are restarted.
"""

from __future__ import annotations

import asyncio
import socket
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_pz.engine.sglang.io_thread import IoThread
from megatron_pz.errors import EngineError
from megatron_pz.sync.buckets import Bucket, buckets, joined
from megatron_pz.sync.push import Receivers, Sent

TIMEOUT_S = 600.0
COPIES = 3
"""Of a bucket in the speaker's memory: as tensors, as the bytes of the broadcast, and the tensor that comes next, made whole."""


@dataclass(frozen=True)
class Stage:
    """The ranks that hold one pipeline stage."""

    index: int
    ranks: tuple[int, ...]
    group: Any  # of `ranks`; its backend is the world's

    @property
    def speaker(self) -> int:
        """The rank that broadcasts."""
        return self.ranks[0]


def make_stages(pp_rank: int, control_group: Any) -> list[Stage]:
    """All stages; collective over all ranks."""
    stage_of: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(stage_of, pp_rank, group=control_group)
    stages = []
    for index in sorted(set(stage_of)):
        ranks = tuple(rank for rank, stage in enumerate(stage_of) if stage == index)
        stages.append(Stage(index, ranks, dist.new_group(list(ranks))))
    return stages


class CollectiveTransport:
    """Broadcasts buckets of bytes from each stage.

    Args:
        export: whole tensors of a stage on its speaker: (weights, stage) -> (name, tensor).
        stages: from `make_stages`.
        control_group: gloo group of all ranks.
        bucket_bytes: memory for tensors under way, all copies together; a larger tensor goes alone.
        backend: "gloo" or "nccl".
        server_ranks: tensor-parallel size of a server.
        io: of rank 0.
        host: address of this rank as the servers reach it.
        device: where buckets are put together.
    """

    def __init__(
        self,
        export: Callable[[Any, Stage], Iterator[tuple[str, Tensor]]],
        stages: Sequence[Stage],
        control_group: Any,
        bucket_bytes: int,
        *,
        backend: str,
        server_ranks: int,
        io: IoThread | None,
        host: str,
        device: torch.device,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._export, self._stages, self._control_group = export, stages, control_group
        self._bucket_bytes, self._backend, self._server_ranks = bucket_bytes, backend, server_ranks
        self._io, self._host, self._device, self._timeout_s = io, host, device, timeout_s
        self._rank = dist.get_rank()
        self._groups: dict[int, Any] = {}  # by stage; on its speaker
        self._members: tuple[int, ...] = ()  # servers in the groups
        self._token = ""  # in the groups' names

    def send(self, weights: Any, version: int, receivers: Receivers) -> Sent:
        """See `sync.push.Transport`."""
        receivers.each(lambda control: control.begin_weight_update())
        self._join(receivers)
        total = largest = 0
        for stage in self._stages:
            if self._rank in stage.ranks or self._rank == 0:
                num_bytes, bucket_bytes = self._send_stage(stage, weights, receivers)
                total, largest = total + num_bytes, max(largest, bucket_bytes)
        receivers.each(lambda control: control.end_weight_update())
        if self._told(bool(receivers.faults)):
            self._leave(receivers)
        return Sent(total, largest)

    def _send_stage(self, stage: Stage, weights: Any, receivers: Receivers) -> tuple[int, int]:
        """Bytes sent and those of the largest bucket, on the speaker and on rank 0."""
        parts = (
            buckets(self._export(weights, stage), self._bucket_bytes // COPIES)
            if self._rank in stage.ranks
            else iter(())
        )
        if self._rank not in (0, stage.speaker):
            assert next(parts, None) is None  # takes part in gathering, and gets nothing
            return 0, 0
        total = largest = 0
        while True:
            bucket = next(parts, None)
            facts = self._to_rank0(stage, _facts(bucket) if bucket else None)
            if facts is None:
                return total, largest
            total, largest = total + facts["num_bytes"], max(largest, facts["num_bytes"])
            self._broadcast(stage, facts, bucket, receivers)

    def _broadcast(self, stage: Stage, facts: dict[str, Any], bucket: Bucket | None, receivers: Receivers) -> None:
        """One bucket: rank 0 announces it, the stage's speaker sends the bytes."""
        asked: Future[dict[int, Any]] | None = None
        if self._rank == 0 and receivers.controls:
            assert self._io is not None
            names = {name: facts[name] for name in ("names", "dtypes", "shapes")}
            asked = self._io.submit(
                receivers.gathered(
                    lambda control: control.update_weights_from_distributed(
                        group_name=_name(stage, self._token), load_format="flattened_bucket", **names
                    )
                )
            )
        if bucket is not None and stage.index in self._groups:
            data = joined(bucket)
            options = dist.BroadcastOptions()
            options.rootRank, options.rootTensor = 0, 0
            try:
                self._groups[stage.index].broadcast([data.to(self._device)], options).wait()
            except RuntimeError:  # a server went away; its own reply tells
                dist.destroy_process_group(self._groups.pop(stage.index))
        if asked is not None:
            receivers.settle(asked.result())

    def _to_rank0(self, stage: Stage, facts: dict[str, Any] | None) -> dict[str, Any] | None:
        """`facts` of the stage's speaker, on it and on rank 0."""
        if stage.speaker == 0:
            return facts
        box: list[Any] = [facts]
        if self._rank == stage.speaker:
            dist.send_object_list(box, dst=0, group=self._control_group)
        else:
            dist.recv_object_list(box, src=stage.speaker, group=self._control_group)
        found: dict[str, Any] | None = box[0]
        return found

    def _told(self, thing: Any) -> Any:
        """`thing` of rank 0, on every rank."""
        box = [thing]
        dist.broadcast_object_list(box, src=0, group=self._control_group)
        return box[0]

    def _join(self, receivers: Receivers) -> None:
        """Make the groups, unless the same servers are in them already."""
        # Servers that outlive a trainer may still be in its groups: a name must not come again.
        members, token = self._told((tuple(sorted(receivers.controls)), uuid.uuid4().hex[:12]))
        if members == self._members or not members:
            return
        self._leave(receivers)
        self._token = token
        world_size = 1 + len(members) * self._server_ranks
        for stage in self._stages:
            address = self._address_of(stage)
            asked: Future[dict[int, Any]] | None = None
            if self._rank == 0:
                assert self._io is not None
                asked = self._io.submit(
                    receivers.gathered_by_server(self._invitation(stage, address, members, world_size))
                )
            if self._rank == stage.speaker:
                with suppress(RuntimeError):  # a server did not come; its own reply tells
                    self._groups[stage.index] = join_group(
                        address, 0, world_size, _name(stage, self._token), self._backend, self._timeout_s
                    )
            if asked is not None:
                receivers.settle(asked.result())
        self._members = members

    def _invitation(
        self, stage: Stage, address: tuple[str, int], members: tuple[int, ...], world_size: int
    ) -> Callable[[int, Any], Any]:
        def invite(server: int, control: Any) -> Any:
            return control.init_weights_update_group(
                master_address=address[0],
                master_port=address[1],
                rank_offset=1 + members.index(server) * self._server_ranks,
                world_size=world_size,
                group_name=_name(stage, self._token),
                backend=self._backend,
            )

        return invite

    def _address_of(self, stage: Stage) -> tuple[str, int]:
        """Where the stage's speaker is met, on every rank."""
        box: list[Any] = [None]
        if self._rank == stage.speaker:
            with socket.socket() as probe:
                probe.bind(("", 0))
                box = [(self._host, probe.getsockname()[1])]
        dist.broadcast_object_list(box, src=stage.speaker, group=self._control_group)
        address: tuple[str, int] = box[0]
        return address

    def _leave(self, receivers: Receivers) -> None:
        """Take the groups down. A server that was lost knows nothing of it."""
        if self._members and self._rank == 0 and self._io is not None and receivers.controls:
            for stage in self._stages:
                name = _name(stage, self._token)
                with suppress(EngineError):
                    self._io.run(_destroyed(receivers, name))
        for group in self._groups.values():
            with suppress(RuntimeError):  # its members may be gone
                dist.destroy_process_group(group)
        self._groups.clear()
        self._members = ()


async def _destroyed(receivers: Receivers, name: str) -> None:
    asked = [control.destroy_weights_update_group(name) for control in receivers.controls.values()]
    await asyncio.gather(*asked, return_exceptions=True)


def join_group(
    address: tuple[str, int], rank: int, world_size: int, name: str, backend: str, timeout_s: float
) -> dist.ProcessGroup:
    """A process group with processes of other programs, as SGLang's servers make it: rank 0 listens at `address`.

    torch has no public call for a group that is not part of the default one; this is the helper behind `new_group`.
    """
    from torch.distributed.distributed_c10d import _new_process_group_helper, _world

    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore(address[0], address[1], world_size, rank == 0, timeout, wait_for_workers=False)
    group, _ = _new_process_group_helper(
        world_size,
        rank,
        [],
        dist.Backend(backend),
        dist.PrefixStore(name, store),
        group_name=name,  # type: ignore[arg-type]
        timeout=timeout,
    )
    _world.pg_group_ranks[group] = {member: member for member in range(world_size)}  # else it cannot be destroyed
    return group


def _name(stage: Stage, token: str) -> str:
    return f"megatron_pz-{token}-{stage.index}"


def _facts(bucket: Bucket) -> dict[str, Any]:
    return {
        "names": [name for name, _ in bucket],
        "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
        "shapes": [list(tensor.shape) for _, tensor in bucket],
        "num_bytes": sum(tensor.numel() * tensor.element_size() for _, tensor in bucket),
    }
