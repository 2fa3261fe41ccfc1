"""Weights for servers on the trainer's own devices: a request says where a bucket lies, its bytes stay where they are.

    trainer's rank 0 ─┐ pieces of a     ┌ whole bucket in rank 0's memory ─ handle ─▶ the server's rank 0
    trainer's rank 1 ─┴ parameter, NCCL ┴ whole bucket in rank 1's memory ─ handle ─▶ the server's rank 1

On GPUs each tensor-parallel rank of a server opens memory of the trainer's rank on the same GPU (CUDA IPC), so every rank puts
the bucket together, from pieces that go from device to device; on a CPU (gloo) a server opens shared memory of rank 0. A rank of
a server takes its own part of the whole tensors. Works on one machine only, as colocation does.
"""

from __future__ import annotations

import base64
import io as bytes_io
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing  # teaches ForkingPickler about tensors
from torch import Tensor

from megatron_pz.engine.sglang.control import Control
from megatron_pz.engine.sglang.io_thread import IoThread
from megatron_pz.platform.ipc import reduced
from megatron_pz.sync.buckets import buckets
from megatron_pz.sync.push import Receivers, Sent
from megatron_pz.sync.tensor import flattened

COPIES = 3
"""Of a bucket on a device at the worst moment: as tensors, as the run of bytes that is made of them, and shared."""


class HandleTransport:
    """Sends handles of flattened buckets.

    Args:
        export: whole tensors by Hugging Face name, on every rank of `owners` and on rank 0; all ranks iterate.
        bucket_bytes: memory for tensors under way, all copies together; a larger tensor goes alone.
        owners: for each server, the trainer's ranks on the devices of its tensor-parallel ranks, in their order.
        device: of this rank.
        control_group: gloo group of all ranks.
        io: of rank 0.
    """

    def __init__(
        self,
        export: Callable[[Any], Iterator[tuple[str, Tensor]]],
        bucket_bytes: int,
        owners: Sequence[Sequence[int]],
        device: torch.device,
        control_group: Any,
        io: IoThread | None,
    ) -> None:
        self._export, self._bucket_bytes, self._owners = export, bucket_bytes, owners
        self._device, self._group, self._io = device, control_group, io
        self._rank = dist.get_rank()
        self._shares = self._rank in {rank for ranks in owners for rank in ranks}

    def send(self, weights: Any, version: int, receivers: Receivers) -> Sent:
        """See `sync.push.Transport`."""
        total = largest = 0
        receivers.each(lambda control: control.begin_weight_update())
        for bucket in buckets(self._export(weights), self._bucket_bytes // COPIES):
            size = sum(tensor.numel() * tensor.element_size() for _, tensor in bucket)
            total, largest = total + size, max(largest, size)
            mine = flattened(bucket, self._device) if self._shares else None
            handles = self._gathered(handle(mine) if mine else None)
            if handles and receivers.controls:
                self._post(handles, receivers)
            dist.barrier(self._group)  # until then the servers read `mine`
        receivers.each(lambda control: control.end_weight_update())
        return Sent(total, largest)

    def _gathered(self, mine: str | None) -> list[str | None] | None:
        """The ranks' handles, on rank 0."""
        found: list[str | None] | None = [None] * dist.get_world_size(self._group) if self._rank == 0 else None
        dist.gather_object(mine, found, dst=0, group=self._group)
        return found

    def _post(self, handles: Sequence[str | None], receivers: Receivers) -> None:
        def post(server: int, control: Control) -> Any:
            payloads = [handles[rank] or "" for rank in self._owners[server]]
            return control.update_weights_from_tensor(payloads, load_format="flattened_bucket")

        assert self._io is not None
        receivers.settle(self._io.run(receivers.gathered_by_server(post)))


def handle(thing: Any) -> str:
    """`thing` as base64 of a pickle that holds its tensors' places in memory; they must live until it was read.

    Torch's other way of sharing memory on a CPU, by open files, ends an SGLang server that is not our child.
    """
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        buffer = bytes_io.BytesIO()
        pickler = ForkingPickler(buffer)
        pickler.dispatch_table = {**pickler.dispatch_table, Tensor: reduced}
        pickler.dump(thing)
    finally:
        torch.multiprocessing.set_sharing_strategy(before)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
