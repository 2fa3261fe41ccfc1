"""What rank 0 does for a round, beside fake servers that answer at once: where it saturates.

Rank 0 plays the game, talks HTTP to the servers, keeps the journal of completions, pays rewards, packs, deals and writes
`rollouts.jsonl`: one Python process, so about one core. Servers are fakes (fake_servers.py) in processes of their own, the
code of rank 0 is the package's. CPU-seconds are told by thread and stage; the rate at which it saturates is rollouts over
the CPU-seconds of all its threads. Several lengths tell what a rollout takes from what a token takes.

`--beside DIR` plays each case by turns with the package of another checkout too, for a ratio in one run; a last round of
one request at a time tells whether both write the same rollouts.jsonl.

Usage: controller.py [--beside DIR] [--cases "short;long"] [--out benchmarks/records/controller]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
from controller_table import parts_of, ratios, tabulated
from parts_meter import Parts, watch_json
from records import cpu_name

PARTS = Parts()
watch_json(PARTS)  # aiohttp keeps what it finds

import megatron_pz  # noqa: E402
from megatron_pz.batch import schedule  # noqa: E402
from megatron_pz.batch.balance import Cost  # noqa: E402
from megatron_pz.batch.schedule import hands  # noqa: E402
from megatron_pz.checkpoint import journal  # noqa: E402
from megatron_pz.checkpoint.journal import CompletionJournal  # noqa: E402
from megatron_pz.config.load import load_config  # noqa: E402
from megatron_pz.corpus.tokenizer import HFTokenizer, load_tokenizer  # noqa: E402
from megatron_pz.engine.sglang.client import Client  # noqa: E402
from megatron_pz.engine.sglang.engine import SGLangEngine  # noqa: E402
from megatron_pz.engine.sglang.io_thread import IoThread  # noqa: E402
from megatron_pz.engine.sglang.pool import Pool  # noqa: E402
from megatron_pz.game.prompts import Templates  # noqa: E402
from megatron_pz.report.jsonl import JsonLines  # noqa: E402
from megatron_pz.report.writers import RunWriter  # noqa: E402
from megatron_pz.tasks import ask, grouping, pretrain_zero  # noqa: E402
from megatron_pz.tasks.journal_rows import journal_rows  # noqa: E402
from megatron_pz.tasks.pretrain_zero import PretrainZero  # noqa: E402
from megatron_pz.tasks.stragglers import Stragglers  # noqa: E402
from megatron_pz.train.collector import collect, spared_collector  # noqa: E402
from megatron_pz.train.play import GamePlayer  # noqa: E402
from megatron_pz.types import Paragraph  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
POLICY = "examples/demo_policy"
COST = Cost(6.08e9, 3.93e5)  # of Qwen3-30B-A3B
PROMPT_TOKENS = 300
SIGMA = 0.8
LATENCY_S = 0.05
PROCESSES = 2
DP_SIZE = 64


WATCHED: tuple[tuple[str, Any, str], ...] = (
    ("tokenizing: encode", HFTokenizer, "encode"),
    ("tokenizing: decode", HFTokenizer, "decode"),
    ("requests checked", Client, "check"),
    ("replies read", Client, "_completion"),
    ("servers chosen", Pool, "live"),
    ("journal: key", journal, "request_key"),
    ("journal: row", journal, "to_row"),
    ("files: append", JsonLines, "append"),
    ("files: fsync", JsonLines, "sync"),
    ("game: span read", ask, "read_span"),
    ("game: answer read", ask, "read_answer"),
    ("game: seeds", ask, "derive"),
    ("game: seeds", pretrain_zero, "derive"),
    ("game: rewards", ask, "prediction_reward"),
    ("advantages", grouping, "advantages"),
    ("packing", schedule, "share_out"),
)
"""What is counted by itself, in `tabulated`'s second table: part, owner and name. JSON is counted by thread."""


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
def fakes(corpus: Path, num_servers: int, mean_tokens: float, latency_s: float) -> Iterator[list[str]]:
    """Their addresses."""
    processes_wanted = min(PROCESSES, num_servers)
    command = [sys.executable, str(HERE / "fake_servers.py"), str(corpus), str(num_servers // processes_wanted)]
    command += [str(mean_tokens), str(SIGMA), str(latency_s)]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(processes_wanted)
    ]
    try:
        ports = [port for one in processes for port in json.loads(one.stdout.readline())]  # type: ignore[union-attr]
        yield [f"http://127.0.0.1:{port}" for port in ports]
    finally:
        for one in processes:
            one.stdin.close()  # type: ignore[union-attr]
        for one in processes:
            try:
                one.wait(60)
            except subprocess.TimeoutExpired:
                one.kill()  # they hold nothing


def play(
    num_paragraphs: int,
    mean_tokens: float,
    num_servers: int,
    at_once: int,
    folder: Path,
    *,
    spared: bool = True,
    latency_s: float = LATENCY_S,
) -> dict[str, Any]:
    """One round as the main loop has it, measured; without `spared`, with Python's own collector."""
    for part, owner, name in WATCHED:
        PARTS.watch(part, owner, name)
    texts, corpus = paragraphs(num_paragraphs, folder)
    config = load_config(
        ["examples/demo.toml", *"--max-response-tokens 4096 --max-prompt-tokens 1024 --engine sglang".split()]
    )
    tokenizer = load_tokenizer(POLICY)
    templates = Templates.load(config.task.template_dir, config.task.prompt_style)
    game = PretrainZero(config.task, config.engine, tokenizer, templates)
    meter = Meter()
    with (
        spared_collector() if spared else nullcontext(),
        fakes(corpus, num_servers, mean_tokens, latency_s) as urls,
    ):
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
        PARTS.forget()
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
        "rollouts_sha256": hashlib.sha256((folder / "rollouts.jsonl").read_bytes()).hexdigest(),
        "stages": meter.stages,
        "parts": {
            part: {"cpu_s": seconds, "calls": PARTS.calls[part]}
            for part, seconds in sorted(PARTS.seconds.items(), key=lambda item: -item[1])
        },
    }


CASES: dict[str, dict[str, Any]] = {
    "short": {"rollouts": 5_000, "mean_tokens": 64, "num_servers": 32, "at_once": 1024},
    "long": {"rollouts": 2_500, "mean_tokens": 1024, "num_servers": 32, "at_once": 1024},
    "many servers": {"rollouts": 5_000, "mean_tokens": 64, "num_servers": 256, "at_once": 1024},
    "many at once": {"rollouts": 10_000, "mean_tokens": 64, "num_servers": 32, "at_once": 8192},
    "100 000": {"rollouts": 100_000, "mean_tokens": 128, "num_servers": 64, "at_once": 2048},
}
"""A round each; every paragraph has 8 masks with 8 predictions each."""
SPARED = "long, own collector"
ORDERLY: dict[str, Any] = {"rollouts": 1440, "mean_tokens": 64, "num_servers": 1, "at_once": 1, "latency_s": 0.0}
"""A round in which requests follow each other: what fakes draw does not depend on who is faster."""


def case(settings: Mapping[str, Any], tree: Path = ROOT) -> dict[str, Any]:
    """Played with the package of `tree` in a process of its own, for its memory."""
    done = subprocess.run(
        [sys.executable, __file__, "--only", json.dumps(settings)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tree)},
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if not Path(found["package"]).is_relative_to(tree):
        raise SystemExit(f"controller: error: {found['package']} was played, {tree} was meant.")
    return found


def alone(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The case, in this process."""
    given = {name: value for name, value in settings.items() if name != "rollouts"}
    with tempfile.TemporaryDirectory() as folder:
        found = play(round(settings["rollouts"] / 72), folder=Path(folder), **given)
    cpu_s = sum(stage["cpu_s"] for stage in found["stages"].values())
    package = {"package": megatron_pz.__file__}
    return {**settings, **found, **package, "cpu_s": cpu_s, "rollouts_a_second": found["rollouts"] / cpu_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="settings of one case, as JSON; told as JSON, without a record")
    parser.add_argument("--cases", default=";".join(CASES), help="names, with semicolons between them")
    parser.add_argument("--beside", type=Path, help="another checkout, played by turns with this one")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/records/controller")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    if arguments.only:
        sys.stdout.write(json.dumps(alone(json.loads(arguments.only))) + "\n")
        return
    chosen = {name: CASES[name] for name in arguments.cases.split(";")}
    ours: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    theirs: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    record: dict[str, Any] = {"date": str(date.today()), "cpu": cpu_name(), "load_average": os.getloadavg()}
    for name, settings in chosen.items():
        for _ in range(arguments.turns):
            if arguments.beside:
                theirs[name].append(case(settings, arguments.beside.resolve()))
            ours[name].append(case(settings))
    last = {name: found[-1] for name, found in ours.items()}
    if "long" in chosen:
        last[SPARED] = case(chosen["long"] | {"spared": False})
    text = (
        "# Rank 0 beside fake servers\n\n"
        f"{record['date']}, {record['cpu']}. A round of PretrainZero with the package's code; servers are fakes that answer at "
        f"once. Prompts of about {PROMPT_TOKENS} tokens, responses log-normal (sigma {SIGMA}), 8 masks a paragraph and 8 predictions "
        f"a mask, {DP_SIZE} data-parallel ranks. CPU-milliseconds of rank 0's process, all threads: it is one Python process, so a "
        f"second of them is a second at least.\n\n{tabulated(last)}\n## By part\n\n{parts_of(last)}"
    )
    record["cases"] = ours | {SPARED: [last[SPARED]]} if SPARED in last else ours
    if arguments.beside:
        both = [case(ORDERLY, tree)["rollouts_sha256"] for tree in (arguments.beside.resolve(), ROOT)]
        record |= {"beside": theirs, "rollouts_sha256": both}
        text += (
            f"\n## Beside {commit_of(arguments.beside)}, by turns\n\n{ratios(ours, theirs)}\nA round of {ORDERLY['rollouts']} "
            f"rollouts with one request at a time: rollouts.jsonl is {'equal' if both[0] == both[1] else 'NOT equal'} to the byte.\n"
        )
    arguments.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    arguments.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print("\n" + text)


def commit_of(tree: Path) -> str:
    """Its commit, short."""
    shown = subprocess.run(
        ["git", "-C", tree, "rev-parse", "--short", "HEAD"], stdout=subprocess.PIPE, text=True, check=True
    )
    return shown.stdout.strip()


if __name__ == "__main__":
    main()
