"""What it gains to play the next round while the trainer learns (`engine.async_steps`): a real SGLang server, real runs.

The demo's job with its rounds made heavier until play and update take about as long, against one server that stays up.
Sides take turns: 0 rounds ahead, 1, 2. On two cores trainer and server have one each, so a step should come down from the
sum of both towards the longer one. `floor` is that: the longer of play and update, of the side without overlap.

Usage: overlap.py [--rounds 2] [--steps 8] [--server-python .venv-sglang/bin/python] [--out benchmarks/records/overlap]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import records
from real_server import KEY, real_server

ROOT = Path(__file__).resolve().parents[2]
SIDES = (0, 1, 2)
FLAGS = ("--eval-interval", "0", "--save-interval", "0", "--show-rollouts", "0", "--no-export-hf", "--no-write-page")
FLAGS += ("--no-tensorboard", "--max-response-tokens", "64", "--stragglers", "wait", "--keep", "1")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--rounds", type=int, default=2)
    arguments.add_argument("--steps", type=int, default=8)
    arguments.add_argument("--server-python", default=".venv-sglang/bin/python")
    arguments.add_argument("--out", default="benchmarks/records/overlap")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        key = Path(folder) / "key"
        key.write_text(KEY)
        steps: dict[int, list[dict[str, float]]] = {ahead: [] for ahead in SIDES}
        with real_server(ROOT / "examples" / "demo_policy", given.server_python) as server:
            for number in range(given.rounds):
                for ahead in SIDES if number % 2 == 0 else SIDES[::-1]:
                    run_dir = Path(folder) / f"run-{number}-{ahead}"
                    steps[ahead] += played(run_dir, ahead, given.steps, server.url, key)
    write(Path(given.out), steps, given)


def played(run_dir: Path, ahead: int, steps: int, url: str, key: Path) -> list[dict[str, float]]:
    """Metrics of a run's steps but the first two (the pipeline fills) and the last `ahead` (it empties)."""
    command = [sys.executable, "-m", "megatron_pz", "examples/demo.toml", "--engine", "sglang", "--server-urls", url]
    command += ["--api-key-file", str(key), "--run-dir", str(run_dir), "--train-iters", str(steps), *FLAGS]
    command += ["--async-steps", str(ahead)]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return rows[2 : len(rows) - ahead]


def write(out: Path, steps: dict[int, list[dict[str, float]]], given: argparse.Namespace) -> None:
    """The record and its table, which is printed too."""
    median = {
        ahead: {
            name: statistics.median(row[name] for row in rows)
            for name in (
                "time/step_s",
                "time/rollout_s",
                "time/train_s",
                "time/sync_s",
                "staleness/mean",
                "staleness/max",
            )
        }
        for ahead, rows in steps.items()
    }
    alone = median[0]
    floor = max(alone["time/rollout_s"], alone["time/step_s"] - alone["time/rollout_s"])
    lines = [
        "# Rounds ahead of the update",
        "",
        f"{date.today()}, two cores, one SGLang server (CPU, demo policy), {given.rounds} runs a side of {given.steps} steps, "
        f"by turns, load average {os.getloadavg()[1]:.1f}. Medians of steps. Floor: the longer of play and the rest of a step, "
        "without overlap.",
        "",
        "| rounds ahead | step | waits for play | update | weights | staleness, mean and most | step over floor | gain |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for ahead, row in median.items():
        lines.append(
            f"| {ahead} | {row['time/step_s']:.2f} s | {row['time/rollout_s']:.2f} s | {row['time/train_s']:.2f} s | "
            f"{row['time/sync_s']:.2f} s | {row['staleness/mean']:.2f}, {row['staleness/max']:.0f} | "
            f"{row['time/step_s'] / floor:.2f} | **{alone['time/step_s'] / row['time/step_s']:.2f}** |"
        )
    text = "\n".join(lines) + "\n"
    record = {
        "date": str(date.today()),
        "machine": platform.processor() or platform.machine(),
        "load_average": os.getloadavg(),
        "floor_s": floor,
        "median": median,
        "steps": steps,
    }
    records.write(out, record, text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
