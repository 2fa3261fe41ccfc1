"""What rank 0 does for a round, beside fake servers that answer at once: where it saturates.

Rank 0 plays the game, talks HTTP to the servers, keeps the journal of completions, pays rewards, packs, deals and writes
`rollouts.jsonl`: one Python process, so about one core. Servers are fakes (fake_servers.py) in processes of their own, the
code of rank 0 is the package's. CPU-seconds are told by thread and stage; the rate at which it saturates is rollouts over
the CPU-seconds of all its threads. Several lengths tell what a rollout takes from what a token takes.

Usage: controller.py [--rollouts 100000] [--out benchmarks/records/controller] [--only NAME]
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
from streaming import cpu_name

from megatron_pz.batch.balance import Cost
from megatron_pz.batch.schedule import hands
from megatron_pz.checkpoint.journal import CompletionJournal
from megatron_pz.config.load import load_config
from megatron_pz.corpus.tokenizer import load_tokenizer
from megatron_pz.engine.sglang.client import Client
from megatron_pz.engine.sglang.engine import SGLangEngine
from megatron_pz.engine.sglang.io_thread import IoThread
from megatron_pz.engine.sglang.pool import Pool
from megatron_pz.game.prompts import Templates
from megatron_pz.report.writers import RunWriter
from megatron_pz.tasks.journal_rows import journal_rows
from megatron_pz.tasks.pretrain_zero import PretrainZero
from megatron_pz.tasks.stragglers import Stragglers
from megatron_pz.train.collector import collect, spare_collector
from megatron_pz.train.play import GamePlayer
from megatron_pz.types import Paragraph

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
POLICY = "examples/demo_policy"
COST = Cost(6.08e9, 3.93e5)  # of Qwen3-30B-A3B
PROMPT_TOKENS = 300
SIGMA = 0.8
PROCESSES = 2
DP_SIZE = 64


class Meter:
    """CPU-seconds by stage, and by thread over all stages."""

    def __init__(self) -> None:
        self.stages: dict[str, dict[str, float]] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what runs inside, of all threads."""
        wall, cpu, threads = time.perf_counter(), time.process_time(), by_thread()
        yield
        now = by_thread()
        spent = {thread: now[thread] - threads.get(thread, 0.0) for thread in now}
        self.stages[name] = {
            "cpu_s": time.process_time() - cpu,
            "wall_s": time.perf_counter() - wall,
            **{f"cpu_s of {thread}": seconds for thread, seconds in spent.items() if seconds > 0.005},
        }


def by_thread() -> dict[str, float]:
    """CPU-seconds of threads that are Python's, by name."""
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    return {names.get(one.id, "other"): one.user_time + one.system_time for one in psutil.Process().threads()}


def paragraphs(count: int, folder: Path) -> tuple[list[Paragraph], Path]:
    """So many texts of about `PROMPT_TOKENS` tokens, and the file in which fakes read them."""
    tokenizer = load_tokenizer(POLICY)
    lines = (ROOT / ".cache/demo/leads.jsonl").read_text(encoding="utf-8").splitlines()
    texts: list[str] = []
    held: list[str] = []
    place = 0
    while len(texts) < count:
        held.append(json.loads(lines[place % len(lines)])["text"])
        place += 1
        if len(tokenizer.encode(" ".join(held))) >= PROMPT_TOKENS:
            texts.append(f"{len(texts)}. " + " ".join(held))  # no two alike
            held = []
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return [Paragraph(f"p{index}", text) for index, text in enumerate(texts)], path


@contextmanager
def fakes(corpus: Path, num_servers: int, mean_tokens: float) -> Iterator[list[str]]:
    """Their addresses."""
    command = [sys.executable, str(HERE / "fake_servers.py"), str(corpus), str(num_servers // PROCESSES)]
    processes = [
        subprocess.Popen([*command, str(mean_tokens), str(SIGMA)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(PROCESSES)
    ]
    try:
        ports = [port for one in processes for port in json.loads(one.stdout.readline())]  # type: ignore[union-attr]
        yield [f"http://127.0.0.1:{port}" for port in ports]
    finally:
        for one in processes:
            one.stdin.close()  # type: ignore[union-attr]
            one.wait(30)


def play(
    num_paragraphs: int, mean_tokens: float, num_servers: int, at_once: int, spared: bool, folder: Path
) -> dict[str, Any]:
    """One round as the main loop has it, measured; without `spared`, with Python's own collector."""
    texts, corpus = paragraphs(num_paragraphs, folder)
    config = load_config(
        ["examples/demo.toml", *"--max-response-tokens 4096 --max-prompt-tokens 1024 --engine sglang".split()]
    )
    tokenizer = load_tokenizer(POLICY)
    templates = Templates.load(config.task.template_dir, config.task.prompt_style)
    game = PretrainZero(config.task, config.engine, tokenizer, templates)
    meter = Meter()
    if spared:
        spare_collector()
    with fakes(corpus, num_servers, mean_tokens) as urls:
        io = IoThread()
        clients = [Client(url, "", vocab_size=tokenizer.vocab_size, context_length=8192) for url in urls]
        pool = Pool(clients, at_once, 600.0)
        ranks: Any = SimpleNamespace(rank=0, broadcast=lambda thing: thing)
        engine = SGLangEngine(ranks, lambda weights, version, servers: [], io, pool)
        engine.load(None, 0)
        record = CompletionJournal(folder / "journal")
        writer = RunWriter(folder, tensorboard=False)
        player = GamePlayer(
            game,
            engine,
            config.task,
            Stragglers(game, config.engine, num_paragraphs, 0),
            lambda generate, step, version: record.keep(generate, step, weights="w", versions=(0, 0)),
        )
        before = psutil.Process().memory_info().rss
        with meter.stage("play"):
            begun = player.begin(1, texts, 0)
            engine.finish(begun.begun)
        with meter.stage("journal's rest"):
            record.flush()
        with meter.stage("pay, group, make samples"):
            played = begun.finish()
        assert played is not None
        with meter.stage("plan and deal"):
            dealt = hands(played.samples, max_tokens=16384, dp_size=DP_SIZE, cost=COST)
            sent = sum(len(pickle.dumps(hand, pickle.HIGHEST_PROTOCOL)) for hand in dealt)
        with meter.stage("rollouts.jsonl"):
            writer.rollouts(journal_rows(played.groups, 1))
        if spared:
            with meter.stage("collect"):
                collect()
        rss = psutil.Process().memory_info().rss - before
        engine.close()
        record.close()
        writer.close()
    rollouts = [rollout for group in played.groups for rollout in group.rollouts]
    return {
        "rollouts": len(rollouts),
        "tokens": sum(len(rollout.completion.token_ids) for rollout in rollouts),
        "trained_samples": len(played.samples),
        "sent_bytes": sent,
        "rss_bytes": rss,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "journal_bytes": sum(file.stat().st_size for file in (folder / "journal").iterdir()),
        "rollouts_bytes": (folder / "rollouts.jsonl").stat().st_size,
        "stages": meter.stages,
    }


CASES: dict[str, dict[str, Any]] = {
    "short": {"rollouts": 10_000, "mean_tokens": 64, "num_servers": 32, "at_once": 1024},
    "long, own collector": {
        "rollouts": 5_000,
        "mean_tokens": 1024,
        "num_servers": 32,
        "at_once": 1024,
        "spared": False,
    },
    "long": {"rollouts": 5_000, "mean_tokens": 1024, "num_servers": 32, "at_once": 1024},
    "many servers": {"rollouts": 10_000, "mean_tokens": 64, "num_servers": 256, "at_once": 1024},
    "many at once": {"rollouts": 10_000, "mean_tokens": 64, "num_servers": 32, "at_once": 8192},
    "100 000": {"rollouts": 100_000, "mean_tokens": 128, "num_servers": 64, "at_once": 2048},
}
"""A round each; every paragraph has 8 masks with 8 predictions each."""


def case(name: str) -> dict[str, Any]:
    """Played in a process of its own, for its memory."""
    command = [sys.executable, __file__, "--only", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def alone(name: str) -> dict[str, Any]:
    """The case, in this process."""
    settings = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        found = play(
            round(settings["rollouts"] / 72),
            settings["mean_tokens"],
            settings["num_servers"],
            settings["at_once"],
            settings.get("spared", True),
            Path(folder),
        )
    cpu_s = sum(stage["cpu_s"] for stage in found["stages"].values())
    return settings | found | {"cpu_s": cpu_s, "rollouts_a_second": found["rollouts"] / cpu_s}


def tabulated(found: dict[str, dict[str, Any]]) -> str:
    """CPU-ms a rollout by stage, a column a case."""
    stages = list(list(found.values())[-1]["stages"])
    head = "| CPU-ms a rollout | " + " | ".join(found) + " |\n|---|" + "---|" * len(found) + "\n"

    def line(title: str, values: Sequence[str]) -> str:
        return f"| {title} | " + " | ".join(values) + " |\n"

    each = list(found.values())
    table = head + line("rollouts", [f"{one['rollouts']}" for one in each])
    table += line("mean tokens of a response", [f"{one['tokens'] / one['rollouts']:.0f}" for one in each])
    table += line("servers, requests under way", [f"{one['num_servers']}, {one['at_once']}" for one in each])
    for stage in stages:
        table += line(
            stage, [f"{1e3 * one['stages'].get(stage, {'cpu_s': 0})['cpu_s'] / one['rollouts']:.3f}" for one in each]
        )
        if stage == "play":
            for thread in ("server talk", "completion journal", "MainThread"):
                seconds = [one["stages"][stage].get(f"cpu_s of {thread}", 0.0) for one in each]
                values = [f"{1e3 * s / one['rollouts']:.3f}" for s, one in zip(seconds, each, strict=True)]
                table += line(f"- of these, thread {thread!r}", values)
    table += line("**all**", [f"**{1e3 * one['cpu_s'] / one['rollouts']:.3f}**" for one in each])
    table += line("rollouts a second at most", [f"{one['rollouts_a_second']:.0f}" for one in each])
    table += line("tokens a second at most", [f"{one['tokens'] / one['cpu_s']:.0f}" for one in each])
    table += line("memory a rollout, kB", [f"{one['rss_bytes'] / one['rollouts'] / 1e3:.1f}" for one in each])
    table += line("memory, peak, GB", [f"{one['peak_bytes'] / 1e9:.2f}" for one in each])
    table += line("journal a rollout, kB", [f"{one['journal_bytes'] / one['rollouts'] / 1e3:.1f}" for one in each])
    table += line(
        "rollouts.jsonl a rollout, kB", [f"{one['rollouts_bytes'] / one['rollouts'] / 1e3:.1f}" for one in each]
    )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES, help="one case, as JSON, without a record")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/records/controller")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    if arguments.only:
        sys.stdout.write(json.dumps(alone(arguments.only)) + "\n")
        return
    found = {name: case(name) for name in CASES}
    record = {"date": str(date.today()), "cpu": cpu_name(), "load_average": os.getloadavg(), "cases": found}
    arguments.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    text = (
        "# Rank 0 beside fake servers\n\n"
        f"{record['date']}, {record['cpu']}. A round of PretrainZero with the package's code; servers are fakes that answer at "
        f"once. Prompts of about {PROMPT_TOKENS} tokens, responses log-normal (sigma {SIGMA}), 8 masks a paragraph and 8 predictions "
        f"a mask, {DP_SIZE} data-parallel ranks. CPU-milliseconds of rank 0's process, all threads: it is one Python process, so a "
        "second of them is a second at least.\n\n"
        f"{tabulated(found)}"
    )
    arguments.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print("\n" + text)


if __name__ == "__main__":
    main()
