"""Tokens a second that a real SGLang server samples of a round in the paper's shape, with bfloat16 and with FP8 weights.

A round of the paper: 32 paragraphs, 8 masks of each, 8 predictions of each mask, prompts of at most 1536 tokens, responses of at
most 4096; a mask's predictions are asked for as soon as it lands. How long responses are on average the paper does not say:
here their lengths are drawn (lognormal, `--mean-response`), and the weights are random, so that only the length ends one. By
default a quarter of the paragraphs, which fits the time. The server's own start is not counted.

Usage: rollouts.py [--out DIR] [--smoke] [--model FOLDER] [--server-python PYTHON] [--paragraphs 8] [--mean-response 512] [--seconds 80]
"""

from __future__ import annotations

import asyncio
import math
import random
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import ROOT, Record, arguments, device, machine, unserved

MASKS, PREDICTIONS, LONGEST_PROMPT, LONGEST_RESPONSE = 8, 8, 1536, 4096
PRECISIONS = {"bfloat16": "trained", "FP8 by blocks": "fp8_blockwise"}


def drawn(rng: random.Random, mean: float, most: int, spread: float = 0.8) -> int:
    """A length with the given mean before it is cut to `most`."""
    return max(1, min(most, int(rng.lognormvariate(math.log(mean) - spread**2 / 2, spread))))


async def played(generate: Any, given: Any, vocab_size: int) -> dict[str, Any]:
    """Sample the round; after `--seconds` what still runs is given up and not counted."""
    from megatron_pz.types import SamplingParams

    rng, tokens, responses = random.Random(0), [0], [0]
    scale = 0.01 if given.smoke else 1.0
    longest = max(8, int(LONGEST_RESPONSE * scale))

    async def ask(prompt: list[int]) -> None:
        length = drawn(rng, given.mean_response * scale, longest)
        done = await generate(prompt, SamplingParams(max_new_tokens=length))
        tokens[0] += len(done.token_ids)
        responses[0] += 1

    async def mask(prompt: list[int]) -> None:
        await ask(prompt)
        await asyncio.gather(*(ask(prompt) for _ in range(PREDICTIONS)))

    def paragraph() -> list[int]:
        length = drawn(rng, 500 * scale, max(8, int(LONGEST_PROMPT * scale)))
        return [rng.randrange(3, vocab_size) for _ in range(length)]

    begun = [
        asyncio.ensure_future(mask(prompt))
        for prompt in (paragraph() for _ in range(given.paragraphs))
        for _ in range(MASKS)
    ]
    start = time.monotonic()
    done, open_ = await asyncio.wait(begun, timeout=given.seconds)
    took = time.monotonic() - start
    for task in open_:
        task.cancel()
    await asyncio.gather(*open_, return_exceptions=True)
    for task in done:
        task.result()  # a request that failed
    return {"seconds": took, "tokens": tokens[0], "responses": responses[0], "whole": not open_}


def measured(precision: str, model: Path, given: Any, gpus: int) -> dict[str, Any]:
    """Of one server, started and ended here."""
    from megatron_pz.config.schema import CheckpointConfig, Config, EngineConfig, ModelConfig, SGLangConfig, TaskConfig
    from megatron_pz.engine.sglang.client import Client
    from megatron_pz.engine.sglang.io_thread import IoThread
    from megatron_pz.engine.sglang.pool import Pool
    from megatron_pz.engine.sglang.specs import context_length, make_fleet
    from megatron_pz.models.folder import read_hf_config
    from megatron_pz.types import SamplingParams

    hf = read_hf_config(model)
    with tempfile.TemporaryDirectory() as run_dir:
        config = Config(
            model=ModelConfig(hf_model=str(model), init="random", params_dtype="bfloat16" if gpus else "float32"),
            task=TaskConfig(max_prompt_tokens=LONGEST_PROMPT if gpus else 128),
            engine=EngineConfig(engine="sglang", max_response_tokens=LONGEST_RESPONSE if gpus else 128),
            checkpoint=CheckpointConfig(run_dir=run_dir),
            sglang=SGLangConfig(
                gpus_per_server=gpus,
                server_python=given.server_python,
                rollout_precision=precision,  # type: ignore[arg-type]
            ),
        )
        longest = context_length(config, hf)
        fleet, key = make_fleet(config, model, Path(run_dir), context_length=longest)
        io, began = IoThread(), time.monotonic()
        try:
            io.run(fleet.wait_ready(300.0, lambda waited, line: None))
            started = time.monotonic() - began
            clients = [Client(url, key, vocab_size=int(hf["vocab_size"]), context_length=longest) for url in fleet.urls]
            pool = Pool(clients, 4096, 600.0)
            try:
                io.run(pool.generate([5, 6, 7], SamplingParams(max_new_tokens=4)))  # the first is slow
                return {"start_s": started, **io.run(played(pool.generate, given, int(hf["vocab_size"])))}
            finally:
                io.run(pool.close())
        finally:
            fleet.stop()
            io.close()


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument(
        "--model", type=Path, default=ROOT / "examples/models/Qwen3-4B-Base", help="config.json is enough"
    )
    parser.add_argument("--server-python", default="")
    parser.add_argument("--paragraphs", type=int, default=8)
    parser.add_argument("--mean-response", type=float, default=512.0)
    parser.add_argument("--seconds", type=float, default=80.0, help="of sampling with each precision")
    given = parser.parse_args()
    on = device(given.smoke)
    gpus = min(1, torch.cuda.device_count()) if on.type == "cuda" else 0
    if given.smoke:
        given.paragraphs = 1
    record = Record(given.out, "rollouts", machine(on, given.server_python) | {"smoke": given.smoke})
    for told, precision in PRECISIONS.items():
        what = (
            f"rollouts, {given.model.name} shape, {told}, {given.paragraphs} x {MASKS} x (1 + {PREDICTIONS}) responses"
        )
        reason = unserved(given.server_python)
        if not reason and precision != "trained" and not gpus:
            reason = "SGLang's FP8 needs a GPU"
        measure = partial(measured, precision, given.model.resolve(), given, gpus)
        found = record.attempt(what, reason, measure)
        if found is None:
            continue
        text = f"{found['tokens'] / found['seconds']:.0f} tokens/s, mean response {found['tokens'] / found['responses']:.0f} tokens"
        text += "" if found["whole"] else f"; cut after {found['seconds']:.0f} s"
        record.add({"what": what, "measured": text, **found})
    record.finish(masks=MASKS, predictions=PREDICTIONS, mean_response=given.mean_response)


if __name__ == "__main__":
    main()
