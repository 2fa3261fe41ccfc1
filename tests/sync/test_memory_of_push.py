"""A push takes no more memory above the model's own than `weight_bucket_mib`, by every transport."""

import json
import os
import subprocess
import sys
from pathlib import Path

import hf_models
import pytest

LAYOUTS = Path(__file__).parents[1] / "layouts"
MIB = 1024**2
BUCKET_MIB = 40
SPARE_MIB = 4  # of pages that were not there before the push, whatever the bucket: stacks, connections, names
SHAPE = {"vocab_size": 256, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 12}  # 126 MiB


@pytest.fixture(scope="module")
def environment():
    paths = os.pathsep.join([str(LAYOUTS.parents[1]), str(LAYOUTS.parent)])
    # Large blocks go back to the system when they are freed, so that the peak is of what is in use.
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "262144"}


@pytest.fixture(scope="module")
def peer(environment):
    command = [sys.executable, str(LAYOUTS / "discarding_peer.py")]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    yield process.stdout.readline().strip()
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def taken(peer, environment, tmp_path_factory):
    """taken(transport, bucket_mib): MiB above the model."""
    folder = tmp_path_factory.mktemp("model")
    settings = hf_models.SMALL | SHAPE | {"model_type": "qwen3", "head_dim": 64, "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps(settings | {"num_attention_heads": 8, "num_key_value_heads": 8}))

    def measure(transport, bucket_mib):
        command = [sys.executable, str(LAYOUTS / "memory_worker.py"), transport, str(bucket_mib), peer, str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        peak, sent = map(int, done.stdout.splitlines()[-1].split())
        assert sent > 3 * BUCKET_MIB * MIB
        print(f"\n{transport}: {peak / MIB:.1f} MiB above the model with buckets of {bucket_mib} MiB")
        return peak / MIB

    return measure


@pytest.mark.parametrize("transport", ["disk", "tensor", "distributed"])
def test_a_push_takes_no_more_than_a_bucket(taken, transport):
    assert taken(transport, BUCKET_MIB) <= BUCKET_MIB + SPARE_MIB
    assert taken(transport, 8 * BUCKET_MIB) > BUCKET_MIB + SPARE_MIB  # so the measure sees what it should
