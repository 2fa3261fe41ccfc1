"""`tools/prepare_corpus.py` on a million short paragraphs and more: time, memory by phase, and what a run pays to open the store.

Texts are beginnings of the demo's leads with a number in words behind them, since texts that differ by digits alone count as
near-duplicates. One in a hundred stands twice. Then a process opens the store: draws from its first and its second half, the
launcher's selection and fixed questions, and the doctor on the demo's settings. The same for a store of a hundredth of the length.

Usage: large_corpus.py [--leads .cache/demo/leads.jsonl] [--paragraphs 1000000] [--workers 1] [--folder DIR]
                       [--out benchmarks/records/large_corpus]
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import records

from megatron_pz.config.load import load_config
from megatron_pz.corpus.cursor import Cursor
from megatron_pz.corpus.prepare import BATCH_DOCUMENTS
from megatron_pz.corpus.store import CorpusStore
from megatron_pz.doctor.checks import LIGHT, WHOLE
from megatron_pz.doctor.patient import Patient
from megatron_pz.platform.select import select_platform

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = str(ROOT / "examples" / "demo_policy")
MIB = 1024**2
TITLE = "## A million paragraphs"
DIGITS = "zero one two three four five six seven eight nine".split()


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--leads", type=Path, default=ROOT / ".cache" / "demo" / "leads.jsonl")
    arguments.add_argument("--paragraphs", type=int, default=1_000_000)
    arguments.add_argument("--workers", type=int, default=1)
    arguments.add_argument("--folder", type=Path, default=None, help="kept; default: one that is removed")
    arguments.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "records" / "large_corpus")
    arguments.add_argument("--open", type=Path, default=None, help="only open this store, and tell what it takes")
    given = arguments.parse_args()
    if given.open:
        sys.stdout.write(json.dumps(opened(given.open)) + "\n")
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as made:
        place = given.folder or Path(made)
        record = records.here()
        record |= {"workers": given.workers, "sizes": {}}
        for number in (given.paragraphs // 100, given.paragraphs):
            source, store = place / f"{number}.jsonl", place / f"store_{number}"
            if not source.exists():
                write_texts(given.leads, source, number)
            if not store.exists():
                told = prepare(source, store, number, given.workers)
                (place / f"{number}.json").write_text(json.dumps(told))
            told = json.loads((place / f"{number}.json").read_text())
            alone = subprocess.run(  # its memory is its own, and its caches are cold
                [sys.executable, __file__, "--open", str(store)], cwd=ROOT, check=True, capture_output=True, text=True
            )
            told |= json.loads(alone.stdout.splitlines()[-1]) | {"jsonl_bytes": source.stat().st_size}
            record["sizes"][number] = told
        given.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    page = given.out.with_name("corpus.md")
    before = page.read_text().partition(f"\n{TITLE}\n")[0] if page.exists() else ""
    page.write_text("\n".join([before.rstrip("\n"), "", *section(record)]) + "\n")


def section(record: dict[str, Any]) -> list[str]:
    """Lines of `corpus.md` about a record."""
    sizes = list(record["sizes"].values())
    rows: list[tuple[str, list[str]]] = [
        ("paragraphs kept", [f"{size['train']['paragraphs']:,}" for size in sizes]),
        ("JSONL", [f"{size['jsonl_bytes'] / 1e6:.1f} MB" for size in sizes]),
        ("store", [f"{size['store_bytes'] / 1e6:.1f} MB" for size in sizes]),
        ("tool, by the clock (other jobs held the cores)", [f"{size['seconds']['merge']:.0f} s" for size in sizes]),
        ("of these, merging", [f"{size['seconds']['merge'] - size['seconds']['batches']:.1f} s" for size in sizes]),
        ("tool, CPU", [f"{size['cpu_s']:.0f} s" for size in sizes]),
        (
            "resident while batches are made, after its start",
            [f"{size['peak_rss']['batches'] / MIB:.0f} MiB" for size in sizes],
        ),
        ("resident while they are merged", [f"{size['peak_rss']['merge'] / MIB:.0f} MiB" for size in sizes]),
        ("a store is opened in", [f"{1e3 * size['open_s']:.1f} ms" for size in sizes]),
        ("a draw from its first half", [f"{1e6 * size['draw_s']['first half']:.0f} µs" for size in sizes]),
        ("a draw from its second half", [f"{1e6 * size['draw_s']['second half']:.0f} µs" for size in sizes]),
        ("memory that the launcher's next three take", [f"{size['grown_bytes'] / MIB:.0f} MiB" for size in sizes]),
    ]
    for name in sizes[0]["seconds_open"]:
        rows.append((name, [f"{size['seconds_open'][name]:.2f} s" for size in sizes]))
    return [
        TITLE,
        "",
        f"{record['date']}, {record['cpu']}, load average {record['load_average'][1]:.1f}; {record['workers']} worker; texts of the "
        "demo with a number in words, one in a hundred twice. From `a store is opened in` on seconds are those of the CPU, since "
        "other jobs held the cores too.",
        "",
        f"| | {' | '.join(f'{number} lines' for number in record['sizes'])} |",
        f"|---|{'---|' * len(sizes)}",
        *(f"| {name} | {' | '.join(values)} |" for name, values in rows),
    ]


def write_texts(leads: Path, out: Path, number: int) -> None:
    """JSON lines; each hundredth repeats the text before it under another id."""
    rows = [json.loads(line) for line in leads.read_text(encoding="utf-8").splitlines()]
    heads = [row["text"][:110].rpartition(" ")[0].rstrip(",;:. ") for row in rows]
    with out.open("w", encoding="utf-8") as file:
        for place in range(number):
            told = place - 1 if place % 100 == 99 else place
            words = " ".join(DIGITS[int(digit)] for digit in str(told))
            text = f"{heads[told % len(heads)]}, and it is entry {words} of the list."
            file.write(json.dumps({"id": f"n{place}", "title": rows[told % len(rows)]["title"], "text": text}) + "\n")


def prepare(source: Path, out: Path, number: int, workers: int) -> dict[str, Any]:
    """Seconds and memory of a run of the tool, before and after its batches are done."""
    command = [
        sys.executable,
        str(ROOT / "tools" / "prepare_corpus.py"),
        str(source),
        str(out),
        "--tokenizer",
        TOKENIZER,
    ]
    start, before = time.perf_counter(), spent()
    process = psutil.Popen(
        [*command, "--workers", str(workers), "--min-tokens", "8"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
    )
    last = out.with_name(f".tmp-{out.name}") / "batches" / f"{(number - 1) // BATCH_DOCUMENTS:07d}.npz"
    first = last.with_name(f"{0:07d}.npz")  # before it, a process reads the tokenizer with `transformers`, and ends
    peak = {"start": 0, "batches": 0, "merge": 0}
    seconds = {"start": 0.0, "batches": 0.0, "merge": 0.0}
    while process.poll() is None:
        begun = seconds["batches"] or first.exists()
        phase = "merge" if seconds["merge"] or last.exists() else "batches" if begun else "start"
        with suppress(psutil.Error):
            held = sum(one.memory_info().rss for one in (process, *process.children(recursive=True)))
            peak[phase] = max(peak[phase], held)
        seconds[phase] = time.perf_counter() - start
        time.sleep(0.05)
    assert process.wait() == 0, command
    card = json.loads((out / "card.json").read_text())
    return {
        "cpu_s": spent() - before,
        "seconds": seconds,
        "peak_rss": peak,
        "counts": card["counts"],
        "train": card["train"],
        "store_bytes": sum(file.stat().st_size for file in out.rglob("*") if file.is_file()),
    }


def opened(folder: Path) -> dict[str, Any]:
    """CPU-seconds to open a store, to draw from its halves, to select from it and to examine a run on it; memory."""
    store, first = timed(lambda: CorpusStore(folder))
    draws = {}
    for name, low, high in (("first half", 0, len(store) // 2), ("second half", len(store) // 2, len(store))):
        rng = random.Random(name)
        places = [rng.randrange(low, high) for _ in range(20_000)]
        rounds = [timed(lambda places=places: [store[place] for place in places])[1] for _ in range(3)]
        draws[name] = statistics.median(rounds) / len(places)
    select_platform("cpu")
    from megatron_pz.train.fixed_sets import fixed_sets  # imports Megatron

    config = load_config(
        [str(ROOT / "examples" / "demo.toml"), "--data-path", str(folder), "--held-out-path", str(folder / "held_out")]
        + ["--hf-model", TOKENIZER, "--template-dir", str(ROOT / "examples" / "templates" / "demo")]
    )
    patient = Patient(config, 1)
    _ = patient.task
    held = psutil.Process().memory_info()
    seconds = {"read by the launcher": timed(lambda: patient.paragraphs)[1]}
    playable = patient.paragraphs
    seconds["fixed questions"] = timed(lambda: fixed_sets(config, patient.tokenizer, patient.templates, playable))[1]
    seconds["order of an epoch"] = timed(lambda: Cursor(len(playable), 1).take(0, 32))[1]
    grown = psutil.Process().memory_info().rss - held.rss
    for name, check in (LIGHT | WHOLE).items():
        seconds[f"doctor: {name}"] = timed(lambda check=check: list(check(patient)))[1]
    return {"open_s": first, "draw_s": draws, "seconds_open": seconds, "grown_bytes": grown, "playable": len(playable)}


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    return call(), time.process_time() - start


def spent() -> float:
    """CPU-seconds of the processes that ended, their workers included."""
    found = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found.ru_utime + found.ru_stime


if __name__ == "__main__":
    main()
