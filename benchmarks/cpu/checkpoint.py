"""Saving and loading a checkpoint beside the disk itself: the same bytes, written and read plainly, by turns in one run.

    raw         one file in blocks of 8 MiB, then fsync
    sync        the store writes while training waits
    async       the store copies the state (training stops for this) and writes while products of matrices go on
    megatron    Megatron's own save of the same state, then checksums of its files, as the store did before
    load        verified and read into model and optimizer, from a cold page cache; beside reading the files once

Usage: checkpoint.py [--rounds 4] [--layers 12] [--save-only] [--folder FOLDER] [--out benchmarks/records/checkpoint]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_pz.platform.select import select_platform

PLATFORM = select_platform("cpu")

import torch  # noqa: E402
from megatron.core import dist_checkpointing  # noqa: E402

from megatron_pz.checkpoint.contents import pieces_to_save  # noqa: E402
from megatron_pz.checkpoint.manifest import write_manifest  # noqa: E402
from megatron_pz.checkpoint.places import Place  # noqa: E402
from megatron_pz.checkpoint.store import CheckpointStore  # noqa: E402
from megatron_pz.config.schema import Config, ModelConfig, TaskConfig, TrainConfig  # noqa: E402
from megatron_pz.models.shards import unwrap  # noqa: E402
from megatron_pz.train.model import build_model  # noqa: E402
from megatron_pz.train.parallel import init_parallel, shutdown  # noqa: E402
from megatron_pz.train.step import Trainer  # noqa: E402

BLOCK, GB, MIB = 8 * 1024**2, 1e9, 1024**2
MODEL = {
    "model_type": "qwen3",
    "vocab_size": 32768,
    "hidden_size": 768,
    "intermediate_size": 2304,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "max_position_embeddings": 64,
    "initializer_range": 0.02,
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--rounds", type=int, default=4)
    arguments.add_argument("--layers", type=int, default=12)
    arguments.add_argument("--save-only", action="store_true", help="raw and sync, and nothing else")
    arguments.add_argument("--folder", default=None, help="on the disk that is measured")
    arguments.add_argument("--out", default="benchmarks/records/checkpoint")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    config = Config(model=ModelConfig(init="random"), task=TaskConfig(task="continue_pt"), train=TrainConfig(lr=1e-3))
    parallel = init_parallel(config.parallel, PLATFORM, seed=1)
    trainer = Trainer(
        build_model(MODEL | {"num_hidden_layers": given.layers}, config, PLATFORM, parallel), config, PLATFORM, parallel
    )
    fill(trainer)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        record = measure(trainer, Path(folder), given.rounds, given.save_only)
    shutdown()
    write(Path(given.out), record)


def fill(trainer: Trainer) -> None:
    """Numbers that are not zero in the moments, and all memory touched."""
    for place, tensor in pieces_to_save(trainer.chunks, trainer.optimizer):
        if isinstance(place, Place) and place.key.startswith("optimizer."):
            tensor.normal_()


def measure(trainer: Trainer, folder: Path, rounds: int, save_only: bool) -> dict[str, Any]:
    pieces = [value for place, value in pieces_to_save(trainer.chunks, trainer.optimizer) if isinstance(place, Place)]
    size = sum(piece.nbytes for piece in pieces)
    alone = 0.0 if save_only else products(lambda count: count >= 60)
    theirs = 0
    store = CheckpointStore(folder / "checkpoints", keep=2 * rounds)  # removing files is no part of it
    rows: dict[str, list[dict[str, float]]] = {}

    def note(side: str, row: dict[str, float]) -> None:
        rows.setdefault(side, []).append(row)
        sys.stderr.write(f"{side} {row}\n")

    for turn in range(rounds):
        note("raw", timed(lambda: raw_write(pieces, folder / "raw")))
        if not save_only:
            note("raw read", cold(folder / "raw", lambda: raw_read(folder / "raw")))
        (folder / "raw").unlink()
        note("sync", timed(partial(store.save, 2 * turn, trainer.chunks, trainer.optimizer, "{}")))
        if save_only:
            shutil.rmtree(store.folder / f"step_{2 * turn:06d}")
            continue
        note("async", background(store, 2 * turn + 1, trainer, alone))
        note("load", cold(store.folder, partial(store.load, 2 * turn + 1, trainer.chunks, trainer.optimizer)))
        note("megatron", timed(lambda: megatron(trainer, folder / "theirs")))
        theirs = sum(path.stat().st_size for path in (folder / "theirs").rglob("*") if path.is_file())
        shutil.rmtree(folder / "theirs")
        for path in store.folder.iterdir():
            shutil.rmtree(path)
    store.close()
    facts = {
        "parameters": sum(p.numel() for chunk in trainer.chunks for p in chunk.parameters()),
        "bytes": size,
        "megatron_bytes": theirs,
        "tensors": len(pieces),
        "date": str(date.today()),
        "load_average": os.getloadavg()[0],
        "versions": {name: version(name) for name in ("torch", "megatron-core")},
    }
    return {"facts": facts, "rows": rows}


def raw_write(pieces: list[torch.Tensor], path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for piece in pieces:
            data = memoryview(piece.contiguous().reshape(-1).view(torch.uint8).numpy())
            for start in range(0, len(data), BLOCK):
                file.write(data[start : start + BLOCK])
        os.fsync(file.fileno())


def raw_read(path: Path) -> None:
    buffer = bytearray(BLOCK)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def megatron(trainer: Trainer, folder: Path) -> None:
    """What the store did before: Megatron's save, then every file read again for its checksum."""
    shards = folder / "shards"
    shards.mkdir(parents=True)
    model = unwrap(trainer.chunks[0]).sharded_state_dict()
    how = {"distrib_optim_sharding_type": "fully_reshardable"}
    state = trainer.optimizer.sharded_state_dict(model, is_loading=False, metadata=how)
    dist_checkpointing.save({"model0": model, "optimizer": state}, str(shards))
    write_manifest(folder, {})


def background(store: CheckpointStore, step: int, trainer: Trainer, alone: float) -> dict[str, float]:
    """Seconds that training stands still, seconds until the checkpoint stands, and how fast work goes on in between."""

    def begin() -> None:
        store.save(step, trainer.chunks, trainer.optimizer, "{}", in_background=True)

    start, spent = time.perf_counter(), time.process_time()
    stopped = timed(begin)
    beside = products(lambda _: store.settle(wait=False) is not None)
    return {
        "seconds": time.perf_counter() - start,
        "cpu": time.process_time() - spent,  # the products' among them
        "stopped": stopped["seconds"],
        "memory": stopped["memory"],
        "work beside": beside / alone,
    }


def products(is_done: Callable[[int], bool]) -> float:
    """Products of matrices a second until `is_done` of their number."""
    a = torch.randn(768, 768)
    count, start = 0, time.perf_counter()
    while not is_done(count):
        torch.mm(a, a)
        count += 1
    return count / (time.perf_counter() - start)


def timed(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds, CPU-seconds of all threads, and bytes of memory that the process took at most beyond what it had."""
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    start, spent = time.perf_counter(), time.process_time()
    work()
    seconds, cpu = time.perf_counter() - start, time.process_time() - spent
    return {"seconds": seconds, "cpu": cpu, "memory": max(0, resident("VmHWM") - before)}


def cold(place: Path, work: Callable[[], Any]) -> dict[str, float]:
    for path in [place, *place.rglob("*")]:
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return timed(work)


def resident(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def write(out: Path, record: dict[str, Any]) -> None:
    facts, rows = record["facts"], record["rows"]
    size = facts["bytes"]

    def median(side: str, name: str = "seconds") -> float:
        return statistics.median(row[name] for row in rows[side])

    lines = [
        "# Checkpoints beside the disk",
        "",
        f"{facts['date']}: {facts['parameters'] / 1e6:.0f} M parameters in float32 with Adam, {size / GB:.2f} GB in "
        f"{facts['tensors']} tensors, one process, two cores, load average {facts['load_average']:.1f}; {len(rows['raw'])} rounds "
        "by turns. Rates are of these bytes; the ratio is each round's own to plain writing (or reading) in it, median and range.",
        "",
        "| | seconds, median (range) | CPU-seconds, median (range) | GB/s | of the disk's rate | memory taken |",
        "|---|---|---|---|---|---|",
    ]
    for side, base in (
        ("raw", "raw"),
        ("sync", "raw"),
        ("async", "raw"),
        ("megatron", "raw"),
        ("raw read", "raw read"),
        ("load", "raw read"),
    ):
        if side not in rows:
            continue
        seconds, cpu = [row["seconds"] for row in rows[side]], [row["cpu"] for row in rows[side]]
        ratios = sorted(b["seconds"] / s["seconds"] for b, s in zip(rows[base], rows[side], strict=True))
        lines.append(
            f"| {side} | {median(side):.2f} ({min(seconds):.2f} to {max(seconds):.2f}) | "
            f"{median(side, 'cpu'):.2f} ({min(cpu):.2f} to {max(cpu):.2f}) | {size / median(side) / GB:.2f} | "
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) | {median(side, 'memory') / MIB:.0f} MiB |"
        )
    stops = [row["stopped"] for row in rows.get("async", [])]
    if stops:
        lines += [
            "",
            f"async: training stands still {stops[0]:.2f} s at the first save, which takes the memory for the copy, and "
            f"{statistics.median(stops[1:] or stops):.2f} s later; the checkpoint stands after the seconds in the table, in which "
            f"products of matrices run at {median('async', 'work beside'):.2f} of their rate. Megatron's file has "
            f"{facts['megatron_bytes'] / GB:.2f} GB: in float32 it saves the weights twice.",
        ]
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
