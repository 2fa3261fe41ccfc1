"""Another process reads a bucket through its handle (sync/handles.py): shared memory on a CPU, CUDA IPC on a GPU."""

import inspect
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing import reductions

from megatron_pz.platform.ipc import reduced
from megatron_pz.sync.handles import handle
from megatron_pz.sync.tensor import flattened

READER = """
import base64, pickle, sys
import torch
from torch.multiprocessing import reductions
original = reductions.rebuild_cuda_tensor
def by_uuid(*arguments):  # as SGLang: a GPU is named by its UUID
    uuids = [str(torch.cuda.get_device_properties(at).uuid) for at in range(torch.cuda.device_count())]
    return original(*arguments[:6], uuids.index(arguments[6]), *arguments[7:])
reductions.rebuild_cuda_tensor = by_uuid
bucket = pickle.loads(base64.b64decode(sys.stdin.readline()))
flat = bucket["flattened_tensor"]
for place in bucket["metadata"]:
    piece = flat[place.start_idx : place.end_idx].view(place.dtype).view(place.shape)
    print(place.name, tuple(piece.shape), piece.float().sum().item(), piece.device.type)
"""


def read_elsewhere(device):
    bucket = [
        ("a", torch.arange(6, dtype=torch.bfloat16).view(2, 3)),
        ("b", torch.full((5,), 0.5, dtype=torch.bfloat16)),
    ]
    held = flattened(bucket, torch.device(device))
    sent = handle(held)
    assert len(sent) < 4000  # a place, not the bytes: see below
    # No child of torch's own: an SGLang server is none either.
    done = subprocess.run([sys.executable, "-c", READER], input=sent, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_a_process_reads_what_the_handle_names_on_a_cpu():
    assert read_elsewhere("cpu") == ["a (2, 3) 15.0 cpu", "b (5,) 2.5 cpu"]


@pytest.mark.gpu
def test_a_process_reads_what_the_handle_names_on_a_gpu():
    assert read_elsewhere("cuda") == ["a (2, 3) 15.0 cuda", "b (5,) 2.5 cuda"]


def test_a_handle_does_not_grow_with_the_bucket():
    lengths = [len(handle(flattened([("a", torch.zeros(size))], torch.device("cpu")))) for size in (10, 1_000_000)]
    assert abs(lengths[1] - lengths[0]) < 40


def test_the_way_of_sharing_memory_is_as_before():
    before = torch.multiprocessing.get_sharing_strategy()
    reducers = dict(ForkingPickler._extra_reducers)
    handle({"tensor": torch.zeros(1)})
    assert ForkingPickler._extra_reducers == reducers
    assert torch.multiprocessing.get_sharing_strategy() == before


def test_a_gpu_is_named_by_its_uuid_since_a_server_counts_only_its_own(monkeypatch):
    # Torch's recipe as it stands for CUDA, without a device: the number of the GPU is the seventh argument.
    arguments = (
        torch.Tensor,
        (2,),
        (1,),
        0,
        "storage",
        torch.bfloat16,
        3,
        "handle",
        64,
        0,
        False,
        "counter",
        0,
        None,
        False,
    )
    monkeypatch.setattr(reductions, "reduce_tensor", lambda tensor: (reductions.rebuild_cuda_tensor, arguments))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"uuid of {device}"))
    rebuild, found = reduced(torch.zeros(2))
    assert rebuild is reductions.rebuild_cuda_tensor
    assert found == (*arguments[:6], "uuid of 3", *arguments[7:])
    assert list(inspect.signature(reductions.rebuild_cuda_tensor).parameters)[6] == "storage_device"
