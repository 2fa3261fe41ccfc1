"""Weights to a server on the same GPU: GB/s of each transport beside a copy on the device, in bfloat16 and FP8.

The trainer's process holds the model, a real SGLang server takes it: `tensor` as CUDA IPC handles, `distributed` over NCCL
(needs a second GPU: NCCL refuses two ranks on one), `disk`. Without SGLang, the part says so and measures what needs no server:
how fast another process reads a bucket through its handle.

Of a folder with a config.json alone, as the default Qwen3-4B's, the weights are random: how fast they travel is the same.

Usage: weight_sync.py [--out DIR] [--smoke] [--model FOLDER] [--server-python PYTHON]
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import ROOT, Record, arguments, copy_rate, device, machine, unserved

from megatron_pz.config.schema import CheckpointConfig, Config, EngineConfig, ModelConfig, SGLangConfig, TaskConfig

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


def settings(transport: str, precision: str, model: Path, python: str, gpus: int, run_dir: str) -> Config:
    """Of a trainer of one rank with a server, on the same GPU where weights go by handles or files."""
    has_weights = any(model.glob("*.safetensors"))
    return Config(
        model=ModelConfig(
            hf_model=str(model),
            init="pretrained" if has_weights else "random",
            params_dtype="bfloat16" if gpus else "float32",
        ),
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


@contextmanager
def served(config: Config, first_gpu: int) -> Iterator[Config]:
    """`config` with the address of a server that was started by it, and ends here."""
    from megatron_pz.engine.sglang.fleet import KEY_FILE
    from megatron_pz.engine.sglang.io_thread import IoThread
    from megatron_pz.engine.sglang.specs import context_length, make_fleet
    from megatron_pz.models.folder import read_hf_config

    model, run_dir = Path(config.model.hf_model), Path(config.checkpoint.run_dir)
    longest = context_length(config, read_hf_config(model))
    fleet, _ = make_fleet(config, model, run_dir, context_length=longest, first_gpu=first_gpu)
    io = IoThread()
    try:
        io.run(fleet.wait_ready(300.0, lambda waited, line: None))
        (url,) = fleet.urls
        yield replace(config, sglang=replace(config.sglang, server_urls=url, api_key_file=str(run_dir / KEY_FILE)))
    finally:
        fleet.stop()
        io.close()


def pushes(config: Config) -> dict[str, Any]:
    """Seconds of three pushes to the server, and bytes that each carried."""
    from megatron_pz.platform.select import select_platform

    platform = select_platform()
    from megatron_pz.checkpoint.hf_import import load_hf_weights
    from megatron_pz.models.folder import read_hf_config
    from megatron_pz.train.engines import make_engine
    from megatron_pz.train.model import build_model
    from megatron_pz.train.parallel import init_parallel, shutdown

    model = Path(config.model.hf_model)
    hf = read_hf_config(model)
    parallel = init_parallel(config.parallel, platform, 1)
    engine: Any = None  # of SGLang
    try:
        chunks = build_model(hf, config, platform, parallel)
        if config.model.init == "pretrained":
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


def told(transport: str, precision: str) -> str:
    """A row's first words."""
    return f"weights by `{transport}` to a server" + (", in FP8" if precision != "trained" else "")


def by_server(
    record: Record, precision: str, transports: dict[str, str], first_gpu: int, given: Any, rate: float
) -> None:
    """Start a server and push to it by each of `transports`, whose values are why it cannot be; empty where it can."""
    for transport, reason in transports.items():
        if reason:
            record.add({"what": told(transport, precision), "reason": reason})
    left = [transport for transport, reason in transports.items() if not reason]
    if not left:
        return
    with tempfile.TemporaryDirectory() as run_dir, ExitStack() as stack:
        of = partial(settings, precision=precision, model=given.model, python=given.server_python)
        of = partial(of, gpus=given.gpus, run_dir=run_dir)
        start = lambda: {"config": stack.enter_context(served(of(left[0]), first_gpu))}  # noqa: E731
        started = record.attempt(f"a server for {', '.join(f'`{name}`' for name in left)}", "", start)
        if started is None:
            return
        for transport in left:
            what, config = told(transport, precision), started["config"]
            way = replace(config.sglang, weight_transport=transport, colocate=transport == "tensor")
            found = record.attempt(what, "", partial(pushes, replace(config, sglang=way)))
            if found is None:
                continue
            gbs = found["num_bytes"] / statistics.median(found["seconds"])
            line = {"what": what, **found, "measured": f"{gbs / 1e9:.2f} GB/s, {gbs / rate:.1%} of a copy"}
            has_aim = transport == "tensor" and precision == "trained"
            record.add(line | ({"aim": f">= {AIM:.0%} of a copy", "met": gbs / rate >= AIM} if has_aim else {}))


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--model", type=Path, help="default: Qwen3-4B's shape; a CPU takes a smaller one only")
    parser.add_argument("--server-python", default="")
    given = parser.parse_args()
    on = device(given.smoke)
    rate = copy_rate(on)
    record = Record(given.out, "weight_sync", machine(on, given.server_python) | {"copy_bytes_per_s": rate})
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
    count = torch.cuda.device_count() if on.type == "cuda" else 0
    given.gpus = min(count, 1)
    given.model = given.model or (ROOT / "examples/models/Qwen3-4B-Base" if count else None)
    reason = "a CPU wants a small --model" if given.model is None else unserved(given.server_python)
    one_gpu = "NCCL needs a GPU of its own for each rank; this machine has one" if count == 1 else ""
    # A server takes half a minute and more to start: one for all that can share it.
    shared = {"tensor": reason, "disk": reason} | ({} if count else {"distributed": reason})
    by_server(record, "trained", shared, 0, given, rate)
    by_server(
        record, "fp8_blockwise", {"tensor": reason or ("" if count else "SGLang's FP8 needs a GPU")}, 0, given, rate
    )
    if count:
        by_server(record, "trained", {"distributed": reason or one_gpu}, 1, given, rate)
    record.finish()


if __name__ == "__main__":
    main()
