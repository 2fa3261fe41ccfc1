"""Another process reads a bucket through its handle (sync/handles.py): shared memory on a CPU, CUDA IPC on a GPU."""

import subprocess
import sys

import pytest
import torch

from megatron_pz.sync.handles import handle
from megatron_pz.sync.tensor import flattened

READER = """
import base64, pickle, sys
import torch
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
    handle({"tensor": torch.zeros(1)})
    assert torch.multiprocessing.get_sharing_strategy() == before
