"""Policies that lie on two ranks, handed to a real server as handles of shared memory. One run of torchrun.

SERVER_KEY=... torchrun --nproc-per-node 2 handle_worker.py JOB.json

JOB.json has `cases`, in order, each with `name`, `folder` (of the policy, Hugging Face), `url`, `layout` (of [parallel]) and `owners`:
for each rank of the server the trainer's rank whose memory it reads; and `prompts`. Rank 0 writes `answers.json` beside it: by case
`answers` (for each prompt `prompt`, `tokens`, `logprobs`, `versions`), `bytes` and `largest_bucket`.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

from megatron_pz.platform.select import select_platform

PLATFORM = select_platform("cpu")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402

from megatron_pz.checkpoint.hf_import import load_hf_weights  # noqa: E402
from megatron_pz.config.schema import Config, EngineConfig, ParallelConfig, SGLangConfig  # noqa: E402
from megatron_pz.engine.sglang.client import Client  # noqa: E402
from megatron_pz.engine.sglang.control import Control  # noqa: E402
from megatron_pz.engine.sglang.io_thread import IoThread  # noqa: E402
from megatron_pz.models.folder import read_hf_config  # noqa: E402
from megatron_pz.sync.expected import check_export  # noqa: E402
from megatron_pz.sync.export import iterate_hf_tensors  # noqa: E402
from megatron_pz.sync.handles import HandleTransport  # noqa: E402
from megatron_pz.sync.push import WeightPush  # noqa: E402
from megatron_pz.train.engines import MIB, make_transport  # noqa: E402
from megatron_pz.train.model import build_model  # noqa: E402
from megatron_pz.train.parallel import init_parallel, shutdown  # noqa: E402
from megatron_pz.types import SamplingParams  # noqa: E402


async def answers(client: Client, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """Sampled responses."""
    params = SamplingParams(max_new_tokens=24, temperature=1.0)
    found = await asyncio.gather(*(client.generate(f"r{at}", tuple(ids), params) for at, ids in enumerate(prompts)))
    return [
        {"prompt": one.prompt_ids, "tokens": one.token_ids, "logprobs": one.logprobs, "versions": one.weight_versions}
        for one in found
    ]


def run(case: dict[str, Any], version: int, prompts: list[list[int]]) -> dict[str, Any] | None:
    """Build, load, push, ask."""
    folder = Path(case["folder"])
    config = Config(
        parallel=ParallelConfig(**case["layout"]),
        engine=EngineConfig(engine="sglang"),
        sglang=SGLangConfig(colocate=True, server_urls=case["url"], weight_bucket_mib=1),
    )
    parallel = init_parallel(config.parallel, PLATFORM, seed=1)
    hf = read_hf_config(folder)
    chunks = build_model(hf, config, PLATFORM, parallel)
    load_hf_weights(chunks, folder)
    check_export(chunks, parallel.control_group)
    io = IoThread() if parallel.is_rank0 else None
    transport = make_transport(config, parallel, folder, io)
    if case["owners"] != [0]:  # as on GPUs, where a server's rank reads memory of the trainer's rank on its own
        export = functools.partial(iterate_hf_tensors, group=dist.group.WORLD, to_rank=None)
        group = parallel.control_group
        transport = HandleTransport(export, MIB, [case["owners"]], parallel.device, group, io)
    controls = []
    if io is not None:
        about = {"vocab_size": hf["vocab_size"], "context_length": hf["max_position_embeddings"]}
        controls = [Control(Client(case["url"], os.environ["SERVER_KEY"], **about))]
    push = WeightPush(transport, io, controls, "retract")
    faults = push(chunks, version, range(len(controls)))
    parallel_state.destroy_model_parallel()
    if io is None:
        return None
    assert faults == [], push.last
    assert push.last is not None
    found = io.run(answers(controls[0].client, prompts))
    io.run(controls[0].client.close())
    io.close()
    return {"answers": found, "bytes": push.last.num_bytes, "largest_bucket": push.last.largest_bucket_bytes}


def main() -> None:
    torch.set_num_threads(1)
    file = Path(sys.argv[1])
    job = json.loads(file.read_text())
    found = {case["name"]: run(case, version, job["prompts"]) for version, case in enumerate(job["cases"], 1)}
    if dist.get_rank() == 0:
        (file.parent / "answers.json").write_text(json.dumps(found))
    shutdown()


if __name__ == "__main__":
    main()
