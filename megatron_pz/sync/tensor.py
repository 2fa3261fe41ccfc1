"""Weights in the bodies of requests, bucket by bucket. Needs no disk and no group; for CPUs and small models.

Bytes travel through host memory. To servers on the trainer's own devices `sync.handles` sends their places instead, and for
weights that stay on GPUs there is `distributed`.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megatron_pz.sync.buckets import Bucket, buckets, joined
from megatron_pz.sync.push import Receivers, Sent

COPIES = 7
"""Of a bucket in the trainer's host memory at the worst moment, measured: two as tensors, five as pickle, base64 and JSON."""


class TensorTransport:
    """Sends pickled CPU tensors, the same to every tensor-parallel rank of a server.

    Args:
        export: whole tensors by Hugging Face name; yields on rank 0 alone, though all ranks iterate.
        bucket_bytes: memory for tensors under way, all copies together; a larger tensor goes alone.
        server_ranks: tensor-parallel size of a server.
    """

    def __init__(
        self, export: Callable[[Any], Iterator[tuple[str, Tensor]]], bucket_bytes: int, server_ranks: int = 1
    ) -> None:
        self._export, self._bucket_bytes, self._server_ranks = export, bucket_bytes, server_ranks

    def send(self, weights: Any, version: int, receivers: Receivers) -> Sent:
        """See `sync.push.Transport`."""
        total = largest = 0
        receivers.each(lambda control: control.begin_weight_update())
        for bucket in buckets(self._export(weights), self._bucket_bytes // COPIES):
            size = sum(tensor.numel() * tensor.element_size() for _, tensor in bucket)
            total, largest = total + size, max(largest, size)
            if receivers.controls:
                payloads = [packed(bucket)] * self._server_ranks
                receivers.each(
                    lambda control, payloads=payloads: control.update_weights_from_tensor(  # type: ignore[misc]
                        payloads, load_format="flattened_bucket"
                    )
                )
        receivers.each(lambda control: control.end_weight_update())
        return Sent(total, largest)


def packed(bucket: Bucket) -> str:
    """`bucket` as SGLang reads it: base64 of the pickle of `flattened`."""
    return base64.b64encode(
        pickle.dumps(flattened(bucket, torch.device("cpu")), protocol=pickle.HIGHEST_PROTOCOL)
    ).decode("ascii")


def flattened(bucket: Bucket, device: torch.device) -> dict[str, Any]:
    """`bucket` as one run of bytes on `device`, and what is where in it.

    One tensor, because a pickle has some kilobytes and a good part of a millisecond for each, and a mixture of experts has
    tens of thousands. SGLang reads the fields of the description by name, so it need not be of SGLang's own class, which is
    not installed here; `SimpleNamespace` is among the few classes that it allows in a pickle.
    """
    places, start = [], 0
    for name, tensor in bucket:
        end = start + tensor.numel() * tensor.element_size()
        place = {"name": name, "shape": tuple(tensor.shape), "dtype": tensor.dtype}
        places.append(SimpleNamespace(**place, start_idx=start, end_idx=end, numel=end - start))
        start = end
    return {"flattened_tensor": joined(bucket).to(device), "metadata": places}
