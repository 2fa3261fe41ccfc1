"""Weights to a server on the same GPU: GB/s of each transport beside a copy on the device, in bfloat16 and FP8.

The trainer's process holds the model, a real SGLang server takes it: `tensor` as CUDA IPC handles, `distributed` over NCCL
(needs a second GPU: NCCL refuses two ranks on one), `disk`. Without SGLang, the part says so and measures what needs no server:
how fast another process reads a bucket through its handle.

Usage: weight_sync.py [--out DIR] [--smoke] [--model FOLDER] [--server-python PYTHON]
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Record, arguments, copy_rate, device, machine

AIM = 0.5
READER = """
import base64, pickle, sys, time
import torch
from torch.multiprocessing import reductions

original = reductions.rebuild_cuda_tensor
def by_uuid(*arguments):
    uuids = [str(torch.cuda.get_device_properties(at).uuid) for at in range(torch.cuda.device_count())]
    place = arguments[6] if isinstance(arguments[6], int) else uuids.index(arguments[6])
    return original(*arguments[:6], place, *arguments[7:])
reductions.rebuild_cuda_tensor = by_uuid
for line in sys.stdin:
    began = time.perf_counter()
    bucket = pickle.loads(base64.b64decode(line))
    copy = bucket["flattened_tensor"].clone()
    if copy.is_cuda:
        torch.cuda.synchronize()
    print(time.perf_counter() - began, flush=True)
    del bucket, copy
"""


def handles(num_bytes: int, on: torch.device) -> list[float]:
    """Seconds in which another process opens a bucket by its handle and copies it: four times, the first starts CUDA."""
    from megatron_pz.sync.handles import handle
    from megatron_pz.sync.tensor import flattened

    bucket = flattened([("weight", torch.ones(num_bytes // 2, dtype=torch.bfloat16, device=on))], on)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    reader = subprocess.Popen(
        [sys.executable, "-c", READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )
    assert reader.stdin is not None and reader.stdout is not None
    found = []
    try:
        for _ in range(4):
            reader.stdin.write(handle(bucket) + "\n")
            reader.stdin.flush()
            found.append(float(reader.stdout.readline()))
    finally:
        reader.stdin.close()
        reader.wait(60)
    return found


def pushes(transport: str, precision: str, model: Path, python: str, gpus: int) -> dict[str, Any]:
    """Seconds of three pushes to a real server, and bytes that each carried."""
    from megatron_pz.platform.select import select_platform

    platform = select_platform()
    from megatron_pz.checkpoint.hf_import import load_hf_weights
    from megatron_pz.config.schema import CheckpointConfig, Config, EngineConfig, ModelConfig, SGLangConfig, TaskConfig
    from megatron_pz.models.folder import read_hf_config
    from megatron_pz.train.engines import make_engine
    from megatron_pz.train.model import build_model
    from megatron_pz.train.parallel import init_parallel, shutdown

    with tempfile.TemporaryDirectory() as run_dir:
        config = Config(
            model=ModelConfig(hf_model=str(model), params_dtype="bfloat16" if gpus else "float32"),
            task=TaskConfig(max_prompt_tokens=64),
            engine=EngineConfig(engine="sglang", max_response_tokens=64),
            checkpoint=CheckpointConfig(run_dir=run_dir),
            sglang=SGLangConfig(
                weight_transport=transport,  # type: ignore[arg-type]
                rollout_precision=precision,  # type: ignore[arg-type]
                colocate=transport == "tensor",
                gpus_per_server=gpus,
                server_python=python,
            ),
            server={"mem-fraction-static": 0.4} if gpus else {},
        )
        hf = read_hf_config(model)
        parallel = init_parallel(config.parallel, platform, 1)
        engine = None
        try:
            chunks = build_model(hf, config, platform, parallel)
            load_hf_weights(chunks, model)
            engine = make_engine(config, chunks, parallel, model, hf, lambda line: None)
            took = []
            for version in range(4):
                began = time.perf_counter()
                engine.load(chunks, version)
                took.append(time.perf_counter() - began)
            return {"seconds": took[1:], "num_bytes": engine.push.last.num_bytes}
        finally:
            if engine is not None:
                engine.close()
            shutdown()


def unserved(model: Path | None, python: str) -> str:
    """Why there can be no server; empty where there can."""
    if model is None:
        return "no --model was given"
    if subprocess.run([python or sys.executable, "-c", "import sglang"], capture_output=True).returncode:
        return "SGLang is not installed in --server-python"
    return ""


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--server-python", default="")
    given = parser.parse_args()
    on = device(given.smoke)
    rate = copy_rate(on)
    record = Record(given.out, "weight_sync", machine(on) | {"copy_bytes_per_s": rate})
    size = 2**30 if on.type == "cuda" else 2**22
    took = statistics.median(handles(size, on)[1:])
    record.add(
        {
            "what": "a bucket read by another process through its handle",
            "measured": f"{size / took / 1e9:.1f} GB/s, {size / took / rate:.0%} of a copy",
            "aim": f">= {AIM:.0%} of a copy",
            "met": size / took / rate >= AIM,
        }
    )
    gpus = torch.cuda.device_count() if on.type == "cuda" else 0
    for transport, precision in (
        ("tensor", "trained"),
        ("tensor", "fp8_blockwise"),
        ("disk", "trained"),
        ("distributed", "trained"),
    ):
        what = f"weights by `{transport}` to a server" + (", in FP8" if precision != "trained" else "")
        reason = unserved(given.model, given.server_python)
        if not reason and transport == "distributed" and gpus == 1:
            reason = "NCCL needs a GPU of its own for each rank; this machine has one"
        if not reason and precision != "trained" and not gpus:
            reason = "SGLang's FP8 needs a GPU"
        measure = partial(pushes, transport, precision, given.model, given.server_python, min(gpus, 1))
        found = record.attempt(what, reason, measure)
        if found is None:
            continue
        gbs = found["num_bytes"] / statistics.median(found["seconds"])
        line = {"what": what, **found, "measured": f"{gbs / 1e9:.2f} GB/s, {gbs / rate:.1%} of a copy"}
        has_aim = transport == "tensor" and precision == "trained"
        record.add(line | ({"aim": f">= {AIM:.0%} of a copy", "met": gbs / rate >= AIM} if has_aim else {}))
    record.finish()


if __name__ == "__main__":
    main()
