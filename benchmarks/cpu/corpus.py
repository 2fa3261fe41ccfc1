"""Rate and memory of `tools/prepare_corpus.py` on a Wikipedia dump, beside plain decompression of the same file in the same run.

The dump has a real one's format and is made of the demo's text (`wiki_dump.py`). Sides take turns: decompression, cutting pages
out, the tool with one and with two workers. Rates are MB of XML a second: of the clock, and of the CPU (all processes), which other
work on the machine disturbs less. Memory: the largest sum of resident and of not shared pages over the tool's processes, every
50 ms. Where a worker's time goes is measured in this process, stage by stage, over some of the pages; parsing also as it would be
if nothing were cut out before it, whose paragraphs have to be the same.

Usage: corpus.py [--leads .cache/demo/leads.jsonl] [--mb 16] [--rounds 2] [--out benchmarks/records/corpus]
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
from collections.abc import Callable
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

import mwparserfromhell
import psutil
import records
from large_corpus import section
from wiki_dump import write_dump

from megatron_pz.corpus import wikitext
from megatron_pz.corpus.dump import decompressed, parse_page, raw_pages
from megatron_pz.corpus.encoder import encoder_maker
from megatron_pz.corpus.ngrams import text_keys
from megatron_pz.corpus.paragraphs import reject_reason
from megatron_pz.corpus.quality import quality_reason

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "prepare_corpus.py"
TOKENIZER = str(ROOT / "examples" / "demo_policy")
MIB = 1024**2
NUM_STAGE_PAGES = 3000


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--leads", type=Path, default=ROOT / ".cache" / "demo" / "leads.jsonl")
    arguments.add_argument("--mb", type=float, default=16.0, help="of XML")
    arguments.add_argument("--rounds", type=int, default=2)
    arguments.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "records" / "corpus")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        file = place / "wiki.xml.bz2"
        facts: dict[str, Any] = write_dump(given.leads, file, int(given.mb * 1e6))
        sides: dict[str, Callable[[], dict[str, float]]] = {
            "decompression": lambda: here(lambda: sum(map(len, decompressed(file)))),
            "pages cut out": lambda: here(lambda: sum(map(len, raw_pages(file)))),
            "tool, 1 worker": lambda: tool(file, place / "out", 1),
            "tool, 2 workers": lambda: tool(file, place / "out", 2),
        }
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for _ in range(given.rounds):
            for name, side in sides.items():
                rounds[name].append(side())
        facts["card"] = json.loads((place / "out" / "card.json").read_text())["counts"]
        stages = by_stage(file)
        write_dump(given.leads, place / "short.xml.bz2", 0)
        facts["start"] = tool(place / "short.xml.bz2", place / "out", 1)
        begun = [sys.executable, str(Path(__file__).with_name("worker_start.py")), TOKENIZER]
        facts["worker"] = json.loads(subprocess.run(begun, check=True, capture_output=True, cwd=ROOT).stdout)
    write(given.out, facts, rounds, stages)


def here(call: Callable[[], object]) -> dict[str, float]:
    start, before = time.perf_counter(), time.process_time()
    call()
    return {"seconds": time.perf_counter() - start, "cpu": time.process_time() - before}


def tool(file: Path, out: Path, workers: int) -> dict[str, float]:
    """One run of the tool, its output removed but for the last."""
    subprocess.run(["rm", "-rf", str(out)], check=True)
    return run([str(file), str(out), "--tokenizer", TOKENIZER, "--workers", str(workers)])


def run(given: list[str]) -> dict[str, float]:
    start, before = time.perf_counter(), spent()
    process = psutil.Popen(
        [sys.executable, str(TOOL), *given], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT
    )
    held = {"resident": 0.0, "anonymous": 0.0}
    while process.poll() is None:
        with suppress(psutil.Error):
            found = [one.memory_info() for one in (process, *process.children(recursive=True))]
            held["resident"] = max(held["resident"], sum(one.rss for one in found))
            held["anonymous"] = max(held["anonymous"], sum(one.rss - one.shared for one in found))
        time.sleep(0.05)
    assert process.wait() == 0, given
    return {"seconds": time.perf_counter() - start, "cpu": spent() - before, **held}


def spent() -> float:
    """CPU-seconds of the processes that ended, their workers included."""
    found = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found.ru_utime + found.ru_stime


def by_stage(file: Path) -> dict[str, float]:
    """CPU-seconds of each stage over the first pages, in its order; `pages` and `xml_bytes` of them."""
    pages = raw_pages(file)
    next(pages)
    raw = [page for page, _ in zip(pages, range(NUM_STAGE_PAGES), strict=False)]
    tokenizer = encoder_maker(TOKENIZER)()
    tokenizer.encode("The first call makes its tables.")
    found: dict[str, float] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        before = time.process_time()
        result = call()
        found[name] = time.process_time() - before
        return result

    parsed = timed("XML", lambda: [parse_page(page) for page in raw])
    texts = [text for _, _, space, is_redirect, text in parsed if space == "0" and not is_redirect]
    cut = timed("references and tables cut out", lambda: [wikitext.cut_out(text) for text in texts])
    names = frozenset({"file", "image", "category"})
    left = timed(
        "infoboxes, lists and files cut out",
        lambda: [wikitext.blocks_cut_out(text, wikitext.KEPT_TEMPLATES, names) for text in cut],
    )
    timed(
        "mwparserfromhell's tree", lambda: sum(1 for text in left if mwparserfromhell.parse(text, skip_style_tags=True))
    )
    whole = timed("(paragraphs, with the three before)", lambda: [wikitext.wiki_paragraphs(text) for text in texts])
    for name, cutting in (("blocks_cut_out", "references and tables alone"), ("cut_out", "nothing")):
        setattr(wikitext, name, lambda text, *_: text)
        slow = timed(
            f"(paragraphs, {cutting} cut out before)", lambda: [wikitext.wiki_paragraphs(text) for text in texts]
        )
        assert whole == slow, "cutting out changed a paragraph"
    paragraphs = [paragraph for page in whole for paragraph in page]
    timed("quality", lambda: [quality_reason(paragraph, "en") for paragraph in paragraphs])
    ids = timed("tokens", lambda: [tokenizer.encode(paragraph) for paragraph in paragraphs])
    both = list(zip(paragraphs, ids, strict=True))
    timed("length and reserved words", lambda: [reject_reason(text, one, tokenizer, 32, 1280) for text, one in both])
    timed("keys of equal texts", lambda: [text_keys(paragraph) for paragraph in paragraphs])
    return found | {"pages": len(raw), "paragraphs": len(paragraphs), "xml_bytes": sum(map(len, raw))}


def write(
    out: Path, facts: dict[str, Any], rounds: dict[str, list[dict[str, float]]], stages: dict[str, float]
) -> None:
    size = facts["xml_bytes"] / 1e6
    floor = statistics.median(row["cpu"] for row in rounds["decompression"])
    lines = [
        "# `tools/prepare_corpus.py` beside decompression",
        "",
        f"{date.today()}, {records.cpu_name()}, two virtual cores, load average {os.getloadavg()[1]:.1f}. "
        f"A dump of {facts['pages']} pages, {size:.1f} MB of XML in {facts['file_bytes'] / 1e6:.1f} MB of bzip2; "
        f"{facts['card']['paragraphs']} paragraphs. Medians of {len(rounds['decompression'])} rounds (lowest to highest). "
        f"A run of the tool on 100 pages takes {facts['start']['cpu']:.1f} CPU-s, most of them in a process that reads the tokenizer "
        f"with `transformers` and ends; a worker begins with {facts['worker']['cpu']:.2f} CPU-s and holds "
        f"{facts['worker']['resident'] / MIB:.0f} MiB ({facts['worker']['anonymous'] / MIB:.0f} not shared).",
        "",
        "| | MB/s by the clock | MB a CPU-s | CPU over decompression | resident, all processes | not shared |",
        "|---|---|---|---|---|---|",
    ]
    for name, rows in rounds.items():
        rate = sorted(size / row["seconds"] for row in rows)
        cpu = statistics.median(row["cpu"] for row in rows)
        memory = [
            f"{max(row[key] for row in rows) / MIB:.0f} MiB" if key in rows[0] else ""
            for key in ("resident", "anonymous")
        ]
        lines.append(
            f"| {name} | {statistics.median(rate):.2f} ({rate[0]:.2f} to {rate[-1]:.2f}) | {size / cpu:.2f} | {cpu / floor:.1f} | "
            f"{' | '.join(memory)} |"
        )
    lines += [
        "",
        f"Where a worker's time goes: {stages['pages']:.0f} pages, {stages['paragraphs']:.0f} paragraphs; in brackets: sums of others.",
        "",
        "| stage | CPU-s | MB a CPU-s |",
        "|---|---|---|",
        *(
            f"| {name} | {seconds:.2f} | {stages['xml_bytes'] / 1e6 / max(seconds, 1e-9):.1f} |"
            for name, seconds in stages.items()
            if name not in ("pages", "paragraphs", "xml_bytes")
        ),
    ]
    large = out.with_name("large_corpus.json")
    if large.exists():
        lines += ["", *section(json.loads(large.read_text()))]
    record = {
        **records.here(),
        "python": sys.version.split()[0],
    }
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    record |= {
        "commit": commit,
        "mwparserfromhell": mwparserfromhell.__version__,
        "options": {"mb": size, "rounds": len(rounds["decompression"])},
    }
    out.with_suffix(".json").write_text(
        json.dumps(record | {"facts": facts, "rounds": rounds, "stages": stages}, indent=1) + "\n"
    )
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
