"""What it gains that a mask's predictions are sent when that mask lands, over waiting for all masks: a real SGLang server.

`barrier` and `streamed` play the same rounds of PretrainZero with the package's task code; the barrier holds every mask
response back until all of the round have landed. `cut` is streamed, begins a quarter more paragraphs and gives up those
that are not among the first to be done. The server has the demo policy and one thread. Each response is made to have a
length drawn from a law by the request's seed (end tokens do not stop it), so that the first two ask for exactly the same;
what the game reads is scripted, so that every mask is valid. Sides take turns, each with an empty prefix cache.

Seconds are CPU-seconds of the server, which is busy with one thread as long as it has a request: on a machine with nothing
else to do they are the round's seconds, and other work does not disturb them. A decode step of this server takes longer the
more requests are in it. Where it does not (a GPU that waits for its memory), the number of steps on the way from the first
request to the last is what counts: `steps` is that number, from the same game and lengths on a clock of steps.

Usage: streaming.py [--rounds 3] [--server-python .venv-sglang/bin/python] [--out benchmarks/records/streaming]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import statistics
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import aiohttp
import psutil
import records
from forced_lengths import Barrier, Clock, Law, scripted
from real_server import real_server

from megatron_pz.config.load import load_config
from megatron_pz.config.schema import EngineConfig
from megatron_pz.corpus.paragraphs import select
from megatron_pz.corpus.reader import read_paragraphs
from megatron_pz.corpus.tokenizer import load_tokenizer
from megatron_pz.engine.sglang.server import ServerProcess
from megatron_pz.engine.sglang.versions import installed_version
from megatron_pz.game.prompts import Templates
from megatron_pz.tasks.pretrain_zero import PretrainZero
from megatron_pz.tasks.stragglers import Played, Stragglers
from megatron_pz.types import Completion, Generate, Paragraph, SamplingParams

ROOT = Path(__file__).resolve().parents[2]
MODEL = "examples/demo_policy"


EQUAL, SKEWED, HEAVY = Law("equal lengths", 0.0), Law("skewed, sigma 0.7", 0.7), Law("heavy tail, sigma 1.2", 1.2)
CASES = ((HEAVY, 64), (SKEWED, 64), (EQUAL, 64))
"""Law of the lengths, and most requests under way at one time."""
SIDES = ("barrier", "streamed", "cut")
OVER_SAMPLING = 0.25


@dataclass
class Meter:
    """Requests under way over time."""

    slots: int
    under_way: int = 0
    busy_s: float = 0.0  # slots times seconds in which a slot had a request
    tokens: int = 0
    asked: list[tuple[tuple[int, ...], int]] = field(default_factory=list)
    _since: float = field(default_factory=time.perf_counter)

    def change(self, by: int) -> None:
        """A request was sent, or has landed."""
        now = time.perf_counter()
        self.busy_s += self.under_way * (now - self._since)
        self._since, self.under_way = now, self.under_way + by


class Server:
    """The server as a `Generate` of forced lengths; replies are scripted by the game's rules."""

    def __init__(
        self, session: aiohttp.ClientSession, process: ServerProcess, game: PretrainZero, law: Law, slots: int
    ) -> None:
        self.session, self.url, self.game, self.law = session, process.url, game, law
        main = psutil.Process(process.pid)
        self._processes = [main, *main.children(recursive=True)]
        self.meter = Meter(slots)
        self._slots = asyncio.Semaphore(slots)
        self._aborts: list[asyncio.Task[None]] = []

    async def __call__(self, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        length = self.law.length(params.seed)
        self.meter.asked.append((tuple(prompt_ids), length))
        sampling = {"max_new_tokens": length, "temperature": 1.0, "ignore_eos": True}
        rid = uuid.uuid4().hex
        body = {"rid": rid, "input_ids": list(prompt_ids), "sampling_params": sampling, "return_logprob": True}
        async with self._slots:
            self.meter.change(+1)
            try:
                async with self.session.post(f"{self.url}/generate", json=body) as reply:
                    reply.raise_for_status()
                    found = await reply.json()
            except asyncio.CancelledError:
                self._aborts.append(asyncio.ensure_future(self.post("/abort_request", {"rid": rid})))
                raise
            finally:
                self.meter.change(-1)
        count = int(found["meta_info"]["completion_tokens"])
        assert count == length, f"{count} tokens came, {length} were asked for"
        self.meter.tokens += count
        return scripted(self.game, prompt_ids, params)

    def cpu_s(self) -> float:
        """CPU-seconds of all its processes since they started."""
        return sum(sum(process.cpu_times()[:2]) for process in self._processes)

    async def post(self, path: str, body: dict[str, str]) -> None:
        """A control call."""
        async with self.session.post(f"{self.url}{path}", json=body) as reply:
            reply.raise_for_status()

    async def rest(self) -> None:
        """Have nothing under way, and an empty cache."""
        await asyncio.gather(*self._aborts)
        self._aborts.clear()
        for _ in range(100):
            with suppress(aiohttp.ClientResponseError):  # 400 while something runs
                return await self.post("/flush_cache", {})
            await asyncio.sleep(0.1)


async def game_of(
    game: PretrainZero, paragraphs: Sequence[Paragraph], number: int, side: str, generate: Generate
) -> Played:
    """A round of all `paragraphs` but the last, which only `cut` begins."""
    per_step = round(len(paragraphs) / (1 + OVER_SAMPLING))
    how: Literal["cut", "wait"] = "cut" if side == "cut" else "wait"
    rounds = Stragglers(game, EngineConfig(stragglers=how, over_sampling=OVER_SAMPLING), per_step, 1234)
    begun = paragraphs if side == "cut" else paragraphs[:per_step]
    if side == "barrier":
        prompts = {tuple(game.prompt_ids(paragraph.text)) for paragraph in begun}
        num_masks = len(begun) * game.config.n_masks_per_paragraph
        generate = Barrier(generate, num_masks, lambda ids: tuple(ids) in prompts)
    played = await rounds.play(number, begun, generate)
    assert all(rollout.valid for rollout in played.rollouts), "a scripted mask was refused"
    return played


async def play(server: Server, paragraphs: Sequence[Paragraph], number: int, side: str) -> dict[str, float]:
    """A round on the server, and on the clock of steps."""
    await server.rest()
    meter = server.meter = Meter(server.meter.slots)
    started, cpu_s = time.perf_counter(), server.cpu_s()
    played = await game_of(server.game, paragraphs, number, side, server)
    wall_s, cpu_s = time.perf_counter() - started, server.cpu_s() - cpu_s
    meter.change(0)
    clock = Clock(server.game, server.law, meter.slots)
    running = asyncio.ensure_future(clock.run())
    await game_of(server.game, paragraphs, number, side, clock)
    running.cancel()
    return {
        "seconds": cpu_s,
        "wall_s": wall_s,
        "steps": clock.steps,
        "idle": 1 - meter.busy_s / (wall_s * meter.slots),
        "tokens": meter.tokens,
        "aborted": played.metrics.get("rounds/requests_aborted", 0.0),
        "asked": hash(tuple(sorted(meter.asked))),
    }


async def compare(server: Server, paragraphs: Sequence[Paragraph], rounds: int) -> list[dict[str, dict[str, float]]]:
    """All sides, round by round; which goes first takes turns."""
    await play(server, paragraphs[:2], 0, "streamed")
    found = []
    for number in range(1, rounds + 1):
        order = SIDES[number % 3 :] + SIDES[: number % 3]
        sides = {name: await play(server, paragraphs, number, name) for name in order}
        asked = {name: side.pop("asked") for name, side in sides.items()}
        assert asked["barrier"] == asked["streamed"], "the sides asked for different things"
        found.append(sides)
    return found


def summary(rounds: Sequence[dict[str, dict[str, float]]]) -> dict[str, float]:
    """Means over the rounds, and gains: barrier's over streamed's, streamed's over those with stragglers cut."""
    found: dict[str, float] = {}
    for what in ("seconds", "steps"):
        for name, one, other in (("gain", "barrier", "streamed"), ("cut_gain", "streamed", "cut")):
            gains = [sides[one][what] / sides[other][what] for sides in rounds]
            found |= {f"{name}_{what}": statistics.fmean(gains)}
            found |= {f"{name}_{what}_least": min(gains), f"{name}_{what}_most": max(gains)}
    for name in SIDES:
        for what in rounds[0][name]:
            found[f"{name}_{what}"] = statistics.fmean(sides[name][what] for sides in rounds)
    return found


async def measure(
    process: ServerProcess, arguments: argparse.Namespace
) -> dict[str, list[dict[str, dict[str, float]]]]:
    """Every law, one after the other."""
    flags = f"--n-masks-per-paragraph {arguments.masks} --n-predictions-per-mask {arguments.predictions}"
    config = load_config(["examples/demo.toml", *flags.split()])
    tokenizer = load_tokenizer(MODEL)
    templates = Templates.load(config.task.template_dir, config.task.prompt_style)
    game = PretrainZero(config.task, config.engine, tokenizer, templates)
    found, _ = read_paragraphs(config.corpus.data_path, skip_bad_lines=False)
    paragraphs, _ = select(found, tokenizer, 12, 40, prompt_ids=game.prompt_ids, max_prompt_tokens=90)
    headers = {"Authorization": f"Bearer {process.spec.api_key}"}
    timeout = aiohttp.ClientTimeout(total=600)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)  # the server closes idle ones
    results = {}
    async with aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector) as session:
        for law, slots in CASES:
            server = Server(session, process, game, law, slots)
            chosen = paragraphs[: math.ceil(arguments.paragraphs * (1 + OVER_SAMPLING))]
            name = f"{law.name}, {slots} under way"
            results[name] = await compare(server, chosen, arguments.rounds)
            print(name, json.dumps(summary(results[name])), flush=True)
    return results


def tabulated(results: dict[str, dict[str, float]]) -> str:
    """In Markdown."""
    lines = [
        "| lengths, most requests under way | tokens | barrier | streamed | gain (least to most) | gain in steps | cut | gain of "
        "cutting, in seconds | in steps | idle |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in results.items():
        idle = ", ".join(f"{row[f'{side}_idle']:.0%}" for side in SIDES)
        lines.append(
            f"| {name} | {row['streamed_tokens']:.0f} | {row['barrier_seconds']:.1f} s | {row['streamed_seconds']:.1f} s | "
            f"**{row['gain_seconds']:.2f}** ({row['gain_seconds_least']:.2f} to {row['gain_seconds_most']:.2f}) | "
            f"{row['gain_steps']:.2f} | {row['cut_seconds']:.1f} s | {row['cut_gain_seconds']:.2f} | "
            f"{row['cut_gain_steps']:.2f} | {idle} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Start a server, measure, print the table, write the records."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--paragraphs", type=int, default=4)
    parser.add_argument("--masks", type=int, default=8)
    parser.add_argument("--predictions", type=int, default=8)
    parser.add_argument("--server-python", default=".venv-sglang/bin/python")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/records/streaming")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    with real_server(ROOT / MODEL, arguments.server_python, max_total_tokens=131072) as server:
        found = asyncio.run(measure(server, arguments))
    results = {name: summary(rounds) for name, rounds in found.items()}
    table = tabulated(results)
    settings = {name: value for name, value in vars(arguments).items() if name not in ("out", "server_python")}
    record = {
        **records.here(),
        "sglang": installed_version(os.path.abspath(arguments.server_python)),
        "settings": settings,
        "rounds": found,
        "summary": results,
    }
    told = (
        f"{record['date']}, {record['cpu']}, SGLang {record['sglang']} on the CPU, one thread, demo policy in float32. A "
        f"round: "
        f"{arguments.paragraphs} paragraphs, {arguments.masks} masks each, {arguments.predictions} predictions of each mask; "
        f"{arguments.rounds} rounds a side, by turns. Seconds: CPU-seconds of the server. Gain: barrier's seconds over streamed's. "
        f"Cut: streamed, with {OVER_SAMPLING:.0%} more paragraphs begun, until as many as without are done; its gain is over streamed. "
        "Steps: decode steps from the first request to the last, where a step takes the same time for any number of requests. "
        "Idle: share of the slots' time without a request, of the three sides."
    )
    text = f"# Streamed levels beside a barrier between them\n\n{told}\n\n{table}"
    records.write(arguments.out, record, text)
    print("\n" + text)


if __name__ == "__main__":
    main()
