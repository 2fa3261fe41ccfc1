"""Does every layout learn what one process learns? Pairs and triples of the ways to share a model out, real torchrun and gloo.

One update on nine packed sequences of unequal lengths, float32, at most eight ranks, of a dense Qwen3, a Qwen3 with experts and
a SmolLM3 with layers without positions. Compared with one process: whole gradients, loss and other metrics, log-probs as
`Trainer.score` gives them, and the weights after the update.

Usage: layout_matrix.py [--most 3] [--models dense,moe,nope] [--only "tp2 sp cp2"] [--out benchmarks/records/layout_matrix]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MAX_RANKS = 8
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
    """Every way to take one to `most` axes, that Megatron-Core and eight ranks allow."""
    axes = [axis for axis in AXES if axis != "expert" or model == "moe"]
    for count in range(1, most + 1):
        for taken in itertools.combinations(axes, count):
            for found in itertools.product(*([(axis, name) for name in AXES[axis]] for axis in taken)):
                if ranks(found) <= MAX_RANKS and is_allowed(model, dict(found)):
                    yield found


def is_allowed(model: str, found: dict[str, str]) -> bool:
    """Whether Megatron-Core trains it: experts under tensor parallelism only with sequence parallelism."""
    return not (model == "moe" and found.get("tensor") == "tp2")


def ranks(found: Choice) -> int:
    """How many processes it takes: what the dense layers need, and at least what the experts need."""
    taken = dict(found)
    stages = 2 if "pipeline" in taken else 1
    dense = 2 ** sum(axis in taken for axis in ("tensor", "context", "data"))
    experts = {None: 1, "ep2": 2, "ep2 etp2": 4}[taken.get("expert")]
    return stages * max(dense, experts)


def case(model: str, found: Choice) -> Any:
    """The `gradients.Case` of it."""
    from gradients import Case

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
    parser.add_argument("--out", default="benchmarks/records/layout_matrix")
    parser.add_argument("--worker", default="", help="for the ranks: where to write")
    given = parser.parse_args()
    # Layouts without positions in some layers differ from others in nothing but the rotation: their pairs are enough.
    wanted = [
        (model, found)
        for model in given.models.split(",")
        for found in choices(model, min(given.most, 2) if model == "nope" else given.most)
        if given.only in ("", told(found))
    ]
    if given.worker:
        world_size = int(os.environ["WORLD_SIZE"])
        work([one for one in wanted if ranks(one[1]) == world_size], Path(given.worker))
        return
    began, rows = time.perf_counter(), []
    for world_size in sorted({ranks(found) for _, found in wanted}):
        rows += launched(world_size)
    write(Path(given.out), rows, time.perf_counter() - began)


def launched(world_size: int) -> list[dict[str, Any]]:
    """What the ranks found."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [*launch, __file__, *sys.argv[1:], "--worker", str(out)],
            env=environment,
            check=True,
            stderr=subprocess.STDOUT,
        )
        return json.loads(out.read_text())


def work(wanted: list[tuple[str, Choice]], out: Path) -> None:
    """All layouts of this world's size, one after the other. All ranks."""
    sys.path.insert(0, str(ROOT / "tests" / "layouts"))
    import torch
    from gradients import alone, compare, outcome, reference_of

    from megatron_pz.train.parallel import shutdown

    torch.set_num_threads(1)
    cases = [(model, found, case(model, found)) for model, found in wanted]
    references = {str(plain(reference_of(one))): plain(reference_of(one)) for _, _, one in cases}
    is_rank0 = os.environ["RANK"] == "0"
    results = alone(references) if is_rank0 else {}
    rows = []
    for model, found, one in cases:
        result = outcome(one)
        if result is not None:
            row = {
                "model": model,
                "layout": told(found),
                "axes": len(found),
                "ranks": ranks(found),
                "updated": one.updated,
            }
            rows.append(row | compare(result, results[str(plain(reference_of(one)))]))
            sys.stdout.write(f"{model} {told(found)}: {rows[-1]['grad']:.1e}, {rows[-1]['worst']:.1e}\n")
            sys.stdout.flush()
    if is_rank0:
        out.write_text(json.dumps(rows))
    shutdown()


def plain(reference: Any) -> Any:
    """The reference keeps all activations."""
    import dataclasses

    return dataclasses.replace(reference, transformer={})


def write(out: Path, rows: list[dict[str, Any]], seconds: float) -> None:
    """The record and its table."""
    over = [row for row in rows if is_over(row)]
    versions = {name: importlib.metadata.version(name) for name in ("megatron-core", "torch")}
    lines = [
        "# Layouts against one process",
        "",
        f"{date.today()}, {len(rows)} layouts of up to {MAX_RANKS} processes, real torchrun and gloo, float32, "
        f"megatron-core {versions['megatron-core']}, torch {versions['torch']}, {seconds / 60:.0f} minutes on two cores, load "
        f"average {os.getloadavg()[1]:.1f}. One update on nine packed sequences of 3 to 23 tokens. Gradient errors are relative: "
        "over all parameters, and of the parameter that is worst. With the distributed optimizer no rank has whole gradients: "
        "there the weights after the update are compared.",
        "",
        f"**{len(over)} of {len(rows)} layouts are off by more than {TOLERANCE:g}.**",
        "",
        "| model | ways taken together | layouts | gradient | worst parameter | weights after | loss and metrics | log-prob, nats |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model, axes in sorted({(row["model"], row["axes"]) for row in rows}):
        mine = [row for row in rows if (row["model"], row["axes"]) == (model, axes)]
        lines.append(f"| {model} | {axes} | {len(mine)} | " + " | ".join(cells(mine)) + " |")
    lines += [
        "",
        "| model | layout | ranks | gradient | worst parameter | weights after |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
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
    }
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write("\n".join(lines[:14]) + "\n")
    for row in over:
        sys.stdout.write(f"over: {row}\n")
    if over:
        sys.exit(1)


def is_over(row: dict[str, Any]) -> bool:
    """Adam turns rounding of small gradients into steps: changes are looked at as parts of the weights."""
    found = [row["weights"], row["metrics"], row["score"]] + ([] if row["updated"] else [row["grad"]])
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
