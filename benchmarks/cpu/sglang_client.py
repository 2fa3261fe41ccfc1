"""Throughput of the pool and its background thread beside a bare aiohttp loop, on the same real SGLang server.

Both sides ask for the same: sampled responses of a forced length with log-probs, so many at a time. `bare` posts and reads
the reply as JSON, nothing else; `pool` is what the trainer uses: an `IoThread` with `Pool.generate`, which checks what it
sends and what comes, spreads, counts, and would repeat and abort. Sides take turns, each with an empty prefix cache; the
server has the demo policy and one thread.

Throughput is tokens a wall-second, in which whatever else the machine does takes part: the ratio is that of medians. What
does not depend on others is told beside it: CPU-seconds of the server, which the client can only make more by leaving it
with fewer requests at a time, and CPU-ms a request of this process, both user and system, all threads.

Usage: sglang_client.py [--rounds 5] [--server-python .venv-sglang/bin/python] [--out benchmarks/records/sglang_client]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import records
from real_server import CONTEXT_LENGTH, real_server

from megatron_pz.engine.sglang.client import Client
from megatron_pz.engine.sglang.control import Control
from megatron_pz.engine.sglang.io_thread import IoThread
from megatron_pz.engine.sglang.pool import Pool
from megatron_pz.engine.sglang.server import ServerProcess
from megatron_pz.engine.sglang.versions import installed_version
from megatron_pz.types import SamplingParams

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "demo_policy"
VOCAB_SIZE = int(json.loads((MODEL / "config.json").read_text(encoding="utf-8"))["vocab_size"])
PROMPT_TOKENS = 32
SIDES = ("bare", "pool")

Prompts = Sequence[tuple[int, ...]]


async def bare(url: str, key: str, prompts: Prompts, at_once: int, tokens: int) -> int:
    """Tokens that came, by the least that asks for them."""
    slots = asyncio.Semaphore(at_once)
    sampling = {"max_new_tokens": tokens, "temperature": 1.0}

    async def ask(prompt: tuple[int, ...]) -> int:
        body = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}
        async with slots, session.post(f"{url}/generate", json=body) as reply:
            return len((await reply.json())["output_ids"])

    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None)
    headers = {"Authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:
        return sum(await asyncio.gather(*map(ask, prompts)))


async def pooled(url: str, key: str, prompts: Prompts, at_once: int, tokens: int) -> int:
    """The same by the trainer's client."""
    client = Client(url, key, vocab_size=VOCAB_SIZE, context_length=CONTEXT_LENGTH)
    pool = Pool([client], at_once, 600.0)
    params = SamplingParams(tokens)
    found = await asyncio.gather(*(pool.generate(prompt, params) for prompt in prompts))
    await pool.close()
    assert pool.counters.retries == 0, "a request was repeated: the machine is too busy to measure"
    return sum(len(completion.token_ids) for completion in found)


def measure(process: ServerProcess, arguments: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Tokens a second and CPU-ms a request of each side, round by round."""
    rng = random.Random(1)
    prompts = [tuple(rng.randrange(10, VOCAB_SIZE) for _ in range(PROMPT_TOKENS)) for _ in range(arguments.requests)]
    io, key = IoThread(), process.spec.api_key
    control = Control(Client(process.url, key, vocab_size=VOCAB_SIZE, context_length=CONTEXT_LENGTH))

    main_process = psutil.Process(process.pid)
    processes = [main_process, *main_process.children(recursive=True)]

    def server_cpu_s() -> float:
        return sum(sum(one.cpu_times()[:2]) for one in processes)

    def run(side: str) -> dict[str, float]:
        io.run(control.flush_cache())
        asked = (process.url, key, prompts, arguments.concurrency, arguments.tokens)
        talk: Coroutine[Any, Any, int] = pooled(*asked) if side == "pool" else bare(*asked)
        server_s, started, cpu_s = server_cpu_s(), time.perf_counter(), time.process_time()
        tokens = io.run(talk) if side == "pool" else asyncio.run(talk)
        wall_s, cpu_s, server_s = time.perf_counter() - started, time.process_time() - cpu_s, server_cpu_s() - server_s
        assert tokens == arguments.requests * arguments.tokens, f"{side}: {tokens} tokens came"
        return {"tokens_per_s": tokens / wall_s, "server_cpu_s": server_s, "cpu_ms": 1000 * cpu_s / arguments.requests}

    found: dict[str, dict[str, list[float]]] = {side: defaultdict(list) for side in SIDES}
    for number in range(arguments.rounds + 1):
        for side in SIDES if number % 2 else SIDES[::-1]:
            row = run(side)
            print(
                f"round {number}, {side}:", ", ".join(f"{what} {value:.4g}" for what, value in row.items()), flush=True
            )
            for what, value in row.items():
                if number:  # the first warms up
                    found[side][what].append(value)
    io.run(control.client.close())
    io.close()
    return found


def main() -> None:
    """Start a server, measure, print the table, write the records."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=192)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--server-python", default=".venv-sglang/bin/python")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/records/sglang_client")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    forced = json.dumps({"ignore_eos": True})  # lengths are the same for both sides
    with real_server(MODEL, arguments.server_python, preferred_sampling_params=forced) as server:
        found = measure(server, arguments)
    medians = {side: {what: statistics.median(values) for what, values in found[side].items()} for side in SIDES}
    rates = {side: found[side]["tokens_per_s"] for side in SIDES}
    ratios = {what: medians["pool"][what] / medians["bare"][what] for what in medians["bare"]}
    each = [a / b for a, b in zip(rates["pool"], rates["bare"], strict=True)]
    lines = ["| medians | tokens/s (least to most) | server's CPU-s | client's CPU-ms a request |", "|---|---|---|---|"]
    for side in SIDES:
        row, span = medians[side], f"{min(rates[side]):.0f} to {max(rates[side]):.0f}"
        lines.append(
            f"| {side} | {row['tokens_per_s']:.0f} ({span}) | {row['server_cpu_s']:.2f} | {row['cpu_ms']:.2f} |"
        )
    lines.append(
        f"| pool / bare | **{ratios['tokens_per_s']:.3f}** (of single rounds {min(each):.3f} to {max(each):.3f}) | "
        f"{ratios['server_cpu_s']:.3f} | {ratios['cpu_ms']:.2f} |"
    )
    table = "\n".join(lines) + "\n"
    settings = {name: value for name, value in vars(arguments).items() if name not in ("out", "server_python")}
    record = {
        **records.here(),
        "sglang": installed_version(os.path.abspath(arguments.server_python)),
        "aiohttp": aiohttp.__version__,
        "settings": settings,
        "rounds": found,
        "medians": medians,
        "ratios": ratios,
    }
    told = (
        f"{record['date']}, {record['cpu']}, load average {os.getloadavg()[0]:.0f}; SGLang {record['sglang']} on the CPU, one "
        f"thread, demo policy in float32; {arguments.requests} requests, {arguments.concurrency} at a time, prompts of "
        f"{PROMPT_TOKENS} and responses of {arguments.tokens} tokens with log-probs; {arguments.rounds} rounds, by turns."
    )
    text = f"# The client beside a bare loop\n\n{told}\n\n{table}"
    records.write(arguments.out, record, text)
    print("\n" + table)


if __name__ == "__main__":
    main()
