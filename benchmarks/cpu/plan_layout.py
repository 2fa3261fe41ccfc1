"""How long a plan takes: Qwen3-30B-A3B on 64, 512 and 4096 ranks, in layouts with few and with many pipeline stages.

Each plan is one call of tools/plan_layout.py in a process of its own, as a user makes it: imports, the model of every rank that
differs, the table; the last one also searches the layouts that fit.

Usage: plan_layout.py [--out benchmarks/records/plan_layout]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = "examples/pretrain_zero_30b_8node.toml"
STAGED = "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 8 --expert-model-parallel-size 16"
CASES = {
    "64 ranks": (64, ""),
    "512 ranks": (512, ""),
    "4096 ranks": (4096, ""),
    "4096 ranks, 8 stages of 3 pieces": (4096, f"{STAGED} --virtual-pipeline-model-parallel-size 3"),
    "4096 ranks, and the layouts that fit": (4096, "--propose"),
}
ASKED_S = 60


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--out", default="benchmarks/records/plan_layout")
    given = arguments.parse_args()
    load = round(os.getloadavg()[0], 1)
    found = {name: measured(*case) for name, case in CASES.items()}
    lines = [
        "# Planning a layout",
        "",
        f"{date.today()}, {os.cpu_count()} cores, load average {load}, one thread, Qwen3-30B-A3B. Whole processes of "
        f"tools/plan_layout.py; {ASKED_S} s are asked for.",
        "",
        "| plan | seconds | CPU-seconds | peak memory |",
        "|---|---|---|---|",
    ]
    for name, one in found.items():
        lines.append(f"| {name} | {one['seconds']:.1f} | {one['cpu_seconds']:.1f} | {one['peak_mib']:.0f} MiB |")
    record = {
        "date": str(date.today()),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average": load,
        "versions": {name: version(name) for name in ("torch", "megatron-core")},
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip(),
        "plans": found,
    }
    out = ROOT / given.out
    out.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines[4:]))


def measured(world_size: int, flags: str) -> dict[str, Any]:
    """Seconds of one plan."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "tools/plan_layout.py", EXAMPLE, "--world-size", str(world_size), *flags.split()],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stdout + done.stderr
    return {
        "flags": flags,
        "world_size": world_size,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2),
        "peak_mib": after.ru_maxrss // 1024,  # of the largest plan so far
    }


if __name__ == "__main__":
    main()
