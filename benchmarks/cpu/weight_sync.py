"""Seconds and memory to hand the weights of a model over to a real SGLang server, by each transport.

Transports take turns, each in a process of its own (memory is a peak of a process), against one server. `floor` is a copy of
the same bytes in memory. SmolLM2-135M by default: `make smollm2`.

Usage: weight_sync.py [--model .cache/smollm2-135m-instruct] [--bucket-mib 64] [--pushes 4] [--out benchmarks/records/weight_sync]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import records
from real_server import KEY, real_server

ROOT = Path(__file__).resolve().parents[2]
TRANSPORTS = ("disk", "tensor", "distributed")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--model", default=".cache/smollm2-135m-instruct")
    arguments.add_argument("--bucket-mib", type=int, default=64)
    arguments.add_argument("--pushes", type=int, default=4)
    arguments.add_argument("--server-python", default=".venv-sglang/bin/python")
    arguments.add_argument("--out", default="benchmarks/records/weight_sync")
    arguments.add_argument("--worker", choices=TRANSPORTS)
    arguments.add_argument("--url")
    given = arguments.parse_args()
    if given.worker:
        sys.stdout.write(json.dumps(pushed(given)) + "\n")
        return
    with real_server(ROOT / given.model, given.server_python) as server:
        found = {}
        for transport in TRANSPORTS:
            command = [sys.executable, __file__, *sys.argv[1:], "--worker", transport, "--url", server.url]
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, text=True)
            found[transport] = json.loads(done.stdout.splitlines()[-1])
    write(Path(given.out), found, given)


def pushed(given: argparse.Namespace) -> dict[str, object]:
    """Seconds of each push but the first (which joins groups), and memory over that of the model."""
    from megatron_pz.config.schema import CheckpointConfig, Config, EngineConfig, ModelConfig, SGLangConfig
    from megatron_pz.platform.select import select_platform

    platform = select_platform("cpu")
    import torch

    from megatron_pz.checkpoint.hf_import import load_hf_weights
    from megatron_pz.engine.sglang.client import Client
    from megatron_pz.engine.sglang.control import Control
    from megatron_pz.engine.sglang.io_thread import IoThread
    from megatron_pz.models.policy import build_policy
    from megatron_pz.sync.push import WeightPush
    from megatron_pz.train.engines import make_transport
    from megatron_pz.train.parallel import init_parallel, shutdown

    torch.set_num_threads(1)
    folder = ROOT / given.model
    hf_config = json.loads((folder / "config.json").read_text())
    with tempfile.TemporaryDirectory() as run_dir:
        config = Config(
            model=ModelConfig(hf_model=str(folder)),
            engine=EngineConfig(engine="sglang"),
            checkpoint=CheckpointConfig(run_dir=run_dir),
            sglang=SGLangConfig(weight_transport=given.worker, weight_bucket_mib=given.bucket_mib),
        )
        parallel = init_parallel(config.parallel, platform, 1)
        model = build_policy(hf_config, config, platform)
        load_hf_weights([model], folder)
        io = IoThread()
        control = Control(Client(given.url, KEY, vocab_size=hf_config["vocab_size"], context_length=512))
        push = WeightPush(make_transport(config, parallel, folder, io), io, [control], "retract")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        seconds = []
        for version in range(given.pushes + 1):
            assert push([model], version, [0]) == [], push.last
            seconds.append(push.last.seconds)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        io.run(control.client.close())
        io.close()
        shutdown()
    data = torch.empty(push.last.num_bytes, dtype=torch.uint8)
    began = time.perf_counter()
    data.clone()
    return {
        "seconds": seconds[1:],
        "first_s": seconds[0],
        "num_bytes": push.last.num_bytes,
        "largest_bucket_bytes": push.last.largest_bucket_bytes,
        "peak_over_model_bytes": peak - before,
        "copy_s": time.perf_counter() - began,
    }


def write(out: Path, found: dict[str, dict[str, object]], given: argparse.Namespace) -> None:
    """The record and its table, which is printed too."""
    size = next(iter(found.values()))["num_bytes"]
    lines = [
        "# Weights to a server, by transport",
        "",
        f"{date.today()}, {Path(given.model).name} in float32 ({size / 1e6:.0f} MB), one SGLang server on the CPU, buckets of "
        f"{given.bucket_mib} MiB, {given.pushes} pushes each, load average {os.getloadavg()[1]:.1f}. "
        "Memory: peak of the trainer's process over what it was with the model loaded.",
        "",
        "| transport | median | fastest | first | times a copy in memory | memory above the model | largest bucket |",
        "|---|---|---|---|---|---|---|",
    ]
    for transport, row in found.items():
        median = statistics.median(row["seconds"])
        lines.append(
            f"| {transport} | {median:.2f} s | {min(row['seconds']):.2f} s | {row['first_s']:.2f} s | {median / row['copy_s']:.1f} | "
            f"{row['peak_over_model_bytes'] / 2**20:.0f} MiB | {row['largest_bucket_bytes'] / 2**20:.0f} MiB |"
        )
    text = "\n".join(lines) + "\n"
    record = {"date": str(date.today()), "load_average": os.getloadavg(), "bucket_mib": given.bucket_mib, **found}
    records.write(out, record, text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
