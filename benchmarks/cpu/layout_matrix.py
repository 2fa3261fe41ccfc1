"""Does every layout learn what one process learns? Pairs and triples of the ways to share a model out, real torchrun and gloo.

One update on nine packed sequences of unequal lengths, float32, at most eight ranks, of a dense Qwen3, a Qwen3 with experts and
a SmolLM3 with layers without positions. Compared with one process: whole gradients, loss and other metrics, log-probs as
`Trainer.score` gives them, and the weights after the update.

Each layout has ranks of its own: torchrun's agent, started from Python, forks them from this process, which has imported
everything already (imports took longer than the layouts), and nothing of one layout is left to the next. What was found
stands in OUT.jsonl, a line a layout, until all are there: the same command goes on, and --seconds makes it stop between two.

Usage: layout_matrix.py [--most 3] [--models dense,moe,nope] [--only "tp2 sp cp2"] [--seconds 90]
                        [--out benchmarks/records/layout_matrix]; status 3: there are more to do
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import pickle
import signal
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "layouts")]
from gradients import Case, compare, outcome, reference_of  # noqa: E402

torch.set_num_threads(1)
MAX_RANKS = 8
HUNG = 240  # seconds after which a rank gives up
TOLERANCE = 1e-5  # relative, of the gradient as a whole
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective"}


def size(name: str) -> str:
    return f"{name}_model_parallel_size" if name != "context" else "context_parallel_size"


TP, PP, EP, CP = ({size(name): 2} for name in ("tensor", "pipeline", "expert", "context"))
SP = {"sequence_parallel": True}
AXES: dict[str, dict[str, dict[str, Any]]] = {
    # Of an axis a layout takes one or none.
    "tensor": {"tp2": TP, "tp2 sp": TP | SP},
    "pipeline": {"pp2": PP, "pp2 vpp2": PP | {"virtual_pipeline_model_parallel_size": 2}},
    "context": {"cp2": CP},
    "data": {"dp2": {}, "dp2 distopt": {"use_distributed_optimizer": True}},
    "expert": {"ep2": EP, "ep2 etp2": EP | {"expert_tensor_parallel_size": 2}},
    "recompute": {"recompute full": FULL, "recompute selective": SELECTIVE},
}
Choice = tuple[tuple[str, str], ...]
"""(axis, what is taken of it), ..."""


def choices(model: str, most: int) -> Iterator[Choice]:
    """Every way to take one to `most` axes."""
    axes = [axis for axis in AXES if axis != "expert" or model == "moe"]
    for count in range(1, most + 1):
        for taken in itertools.combinations(axes, count):
            yield from itertools.product(*([(axis, name) for name in AXES[axis]] for axis in taken))


def refusal(model: str, found: Choice) -> str:
    """Why it is not tried, or nothing."""
    if model == "moe" and dict(found).get("tensor") == "tp2":
        return "Megatron-Core trains experts under tensor parallelism only with sequence parallelism"
    if ranks(found) > MAX_RANKS:
        return f"it takes more than {MAX_RANKS} processes"
    return ""


def ranks(found: Choice) -> int:
    """How many processes it takes: what the dense layers need, and at least what the experts need."""
    taken = dict(found)
    stages = 2 if "pipeline" in taken else 1
    dense = 2 ** sum(axis in taken for axis in ("tensor", "context", "data"))
    experts = {None: 1, "ep2": 2, "ep2 etp2": 4}[taken.get("expert")]
    return stages * max(dense, experts)


def case(model: str, found: Choice) -> Any:
    """The `gradients.Case` of it."""
    taken = dict(found)
    layout: dict[str, Any] = {}
    for axis, name in found:
        layout |= AXES[axis][name] if axis != "recompute" else {}
    updated = layout.pop("use_distributed_optimizer", False)
    return Case(
        model,
        layout,
        layers=4 if taken.get("pipeline") == "pp2 vpp2" else 2,
        transformer=AXES["recompute"][taken["recompute"]] if "recompute" in taken else {},
        updated=updated,
        replayed=model == "moe" and "expert" in taken and len(found) % 2 == 0,
    )


def told(found: Choice) -> str:
    return " ".join(name for _, name in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--most", type=int, default=3, help="axes of a layout at most")
    parser.add_argument("--models", default="dense,moe,nope")
    parser.add_argument("--only", default="", help="a layout by its name")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no layout after these")
    parser.add_argument("--out", default="benchmarks/records/layout_matrix")
    given = parser.parse_args()
    every = [(model, found) for model in given.models.split(",") for found in choices(model, given.most)]
    every = sorted((one for one in every if given.only in ("", told(one[1]))), key=lambda one: len(one[1]))
    wanted = [one for one in every if not refusal(*one)]
    began, progress = time.perf_counter(), Path(given.out).with_suffix(".jsonl")
    known = [json.loads(line) for line in progress.read_text().splitlines()] if progress.exists() else []
    rows = {(row["model"], row["layout"]): row for row in known}
    with tempfile.TemporaryDirectory() as folder, progress.open("a", encoding="utf-8") as file:
        for number, (model, found) in enumerate(wanted):
            if (model, told(found)) in rows:
                continue
            if time.perf_counter() - began > given.seconds:
                sys.stdout.write(f"{len(rows)} of {len(wanted)} done\n")
                sys.exit(3)
            row = rows[model, told(found)] = learned(model, found, Path(folder))
            file.write(json.dumps(row) + "\n")
            file.flush()
            error = f"{row['grad']:.1e}, {row['worst']:.1e}" if "grad" in row else row["failed"]
            sys.stdout.write(f"{number + 1}/{len(wanted)} {model} {told(found)}: {error} ({row['seconds']:.1f} s)\n")
            sys.stdout.flush()
    write(Path(given.out), [rows[model, told(found)] for model, found in wanted], every)
    progress.unlink()


def learned(model: str, found: Choice, folder: Path) -> dict[str, Any]:
    """Errors of a layout."""
    one = case(model, found)
    began = time.perf_counter()
    row = {"model": model, "layout": told(found), "axes": len(found), "ranks": ranks(found), "updated": one.updated}
    try:
        errors = launched(compared, ranks(found), one, reference(one, folder))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        message = failure.message if isinstance(failure.message, str) else failure.message["message"]
        errors = {"failed": f"rank {rank}: {message.splitlines()[-1] if message else failure.exitcode}"}
    return row | errors | {"seconds": time.perf_counter() - began}


def reference(one: Any, folder: Path) -> Path:
    """File with the outcome of one process, with all activations kept."""
    alone = dataclasses.replace(reference_of(one), transformer={})
    path = folder / hashlib.sha256(repr(alone).encode()).hexdigest()
    if not path.exists():
        launched(written, 1, alone, path)
    return path


def launched(function: Callable[..., Any], world_size: int, *given: Any) -> Any:
    """What rank 0 returns under torchrun's agent."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="fork",
    )
    return elastic_launch(config, function)(*given)[0]


@record
def compared(one: Any, path: Path) -> dict[str, Any] | None:
    """A rank: errors beside the reference, on rank 0."""
    signal.alarm(HUNG)
    result = outcome(one)
    return compare(result, pickle.loads(path.read_bytes())) if result is not None else None


@record
def written(one: Any, path: Path) -> None:
    """The only rank: its outcome into a file."""
    path.write_bytes(pickle.dumps(outcome(one)))


def write(out: Path, rows: list[dict[str, Any]], every: list[tuple[str, Choice]]) -> None:
    """The record and its table."""
    over = [row for row in rows if is_over(row)]
    refused = Counter((model, why) for model, found in every if (why := refusal(model, found)))
    seconds = sum(row["seconds"] for row in rows)
    versions = {name: importlib.metadata.version(name) for name in ("megatron-core", "torch")}
    lines = [
        "# Layouts against one process",
        "",
        f"{date.today()}, {len(rows)} layouts of up to {MAX_RANKS} processes, real torchrun and gloo, float32, "
        f"megatron-core {versions['megatron-core']}, torch {versions['torch']}, {seconds / 60:.0f} minutes on two cores, load "
        f"average {os.getloadavg()[1]:.1f}. One update on nine packed sequences of 3 to 23 tokens. Gradient errors are relative: "
        "over all parameters, and of the parameter that is worst. With the distributed optimizer no rank has whole gradients: "
        "there the weights after the update are compared. Elsewhere these are shown only: an element whose gradient is rounding goes "
        "either way by the learning rate under Adam (one of 1e-8 beside a mean of 0.08 makes the 2.0e-05).",
        "",
        f"**{len(over)} of {len(rows)} layouts are off by more than {TOLERANCE:g}.**",
        "",
        "| model | ways taken together | layouts | gradient | worst parameter | weights after | loss and metrics | log-prob, nats |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model, axes in sorted({(row["model"], row["axes"]) for row in rows}):
        mine = [row for row in rows if (row["model"], row["axes"]) == (model, axes) and "failed" not in row]
        lines.append(f"| {model} | {axes} | {len(mine)} | " + " | ".join(cells(mine)) + " |")
    lines += ["", "Not tried:", ""]
    lines += [f"- {model}: {count} layouts, as {why}." for (model, why), count in refused.items()] or ["- nothing."]
    lines += [
        "",
        "| model | layout | ranks | gradient | worst parameter | weights after |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['model']} | {row['layout']} | {row['ranks']} | {row['failed']} |||")
            continue
        gradient, worst, weights, *_ = cells([row])
        name = f" ({row['name'].removeprefix('model.')})" if not row["updated"] else ""
        lines.append(f"| {row['model']} | {row['layout']} | {row['ranks']} | {gradient} | {worst}{name} | {weights} |")
    out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    record = {
        "date": str(date.today()),
        "versions": versions,
        "seconds": seconds,
        "load_average": os.getloadavg(),
        "tolerance": TOLERANCE,
        "layouts": rows,
        "refused": [{"model": model, "why": why, "count": count} for (model, why), count in refused.items()],
    }
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write("\n".join(lines[:14]) + "\n")
    for row in over:
        sys.stdout.write(f"over: {row}\n")
    if over:
        sys.exit(1)


def is_over(row: dict[str, Any]) -> bool:
    """Weights after the update count where there is no gradient to look at: Adam's first step is a gradient's sign, so an element
    whose gradient is rounding goes either way by the learning rate."""
    if "failed" in row:
        return True
    found = [row["metrics"], row["score"], row["weights"] if row["updated"] else row["grad"]]
    return not all(math.isfinite(value) and value <= TOLERANCE for value in found)


def cells(rows: list[dict[str, Any]]) -> list[str]:
    """The largest of each error."""
    kept = [row for row in rows if not row["updated"]]

    def largest(of: list[dict[str, Any]], name: str) -> str:
        return f"{max(row[name] for row in of):.1e}" if of else "-"

    return [
        largest(kept, "grad"),
        largest(kept, "worst"),
        *(largest(rows, name) for name in ("weights", "metrics", "score")),
    ]


if __name__ == "__main__":
    main()
