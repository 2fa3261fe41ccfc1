"""A learning curve on one GPU: PretrainZero, the random-span baseline and a control that does not learn, over seeds.

`--study precision` compares PretrainZero with servers that sample with the trainer's bfloat16 weights, and with FP8 blocks of them:
on the demo's policy, since SmolLM2-135M has no blocks (576 is no multiple of 128).

Each is an ordinary run, `python -m megatron_pz CONFIG`, colocated with a server where SGLang is, else with the embedded engine.
Runs that are done are not repeated, so that the same command goes on after it was cut. The record has every score of the fixed
masks and an SVG of the curves.

Usage: curve.py [--out DIR] [--smoke] [--study game|precision] [--config FILE] [--seeds 3] [--steps 40] [--minutes 9]
                [--server-python PYTHON]
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import ROOT, Record, arguments, device, machine, unserved

STUDIES: dict[str, dict[str, list[str]]] = {
    "game": {
        "pretrain_zero": [],
        "random_span": ["--task", "random_span"],
        "control": ["--lr", "0", "--min-lr", "0", "--lr-decay-style", "constant"],
    },
    "precision": {"bfloat16": [], "fp8_blockwise": ["--rollout-precision", "fp8_blockwise"]},
}
CONFIGS = {"game": "examples/demo_smollm2.toml", "precision": "examples/demo.toml"}
COLOURS = ("#1b6ca8", "#c05a00", "#777777")
OUT_OF_TIME = "out of time; the same command goes on"
METRIC = "eval/{}/accuracy"
GAP = "mismatch_kl"


def command(arm: str, seed: int, run_dir: Path, given: Any, on_gpu: bool) -> list[str]:
    """One run."""
    flags = ["--run-dir", str(run_dir), "--seed", str(seed), "--train-iters", str(given.steps)]
    flags += STUDIES[given.study][arm]
    if given.smoke:
        flags += ["--paragraphs-per-step", "2", "--n-masks-per-paragraph", "2", "--n-predictions-per-mask", "2"]
        flags += ["--num-fixed-masks", "8", "--eval-interval", "1", "--show-rollouts", "0"]
    if on_gpu and not unserved(given.server_python):
        flags += [
            "--engine",
            "sglang",
            "--colocate",
            "--server.mem-fraction-static",
            "0.6",
            "--gpus-per-server",
            "1",
            "--server-python",
            given.server_python,
        ]
    if on_gpu:
        flags += ["--params-dtype", "bfloat16", "--log-prob-kernel", "auto"]
    return [sys.executable, "-m", "megatron_pz", given.config, *flags]


def unrun(arm: str, given: Any, on_gpu: bool) -> str:
    """Why an arm cannot be run; empty where it can."""
    if "--rollout-precision" not in STUDIES[given.study][arm]:
        return ""
    return unserved(given.server_python) if on_gpu else "SGLang's FP8 needs a GPU"


def ran(command: list[str], deadline: float) -> str:
    """Why the run did not end well; empty where it did. At the deadline it is told to save and stop."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, told = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.terminate()
        process.communicate()
        return OUT_OF_TIME
    lines = told.strip().splitlines()
    return (lines[-1][:160] if lines else f"status {process.returncode}") if process.returncode else ""


def peaks(folder: Path) -> dict[str, float]:
    """Most bytes of the trainer on its GPU over all runs, by phase; nothing on a CPU."""
    found: dict[str, float] = {}
    for file in folder.glob("*/metrics.jsonl"):
        for line in file.read_text(encoding="utf-8").splitlines():
            for name, value in json.loads(line).items():
                if name.startswith("memory/peak_"):
                    phase = name.removeprefix("memory/peak_").removesuffix("_bytes")
                    found[phase] = max(found.get(phase, 0.0), value)
    return found


def numbers(run_dir: Path, metric: str) -> dict[int, float]:
    """A metric by step."""
    file = run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    return {row["step"]: row[metric] for row in rows if metric in row}


def plot(curves: dict[str, list[dict[int, float]]]) -> str:
    """Mean over seeds as a line, each seed thin beside it."""
    steps = sorted({step for seeds in curves.values() for seed in seeds for step in seed}) or [0]
    top = max([0.01, *(value for seeds in curves.values() for seed in seeds for value in seed.values())])
    last = max(1, steps[-1])

    def line(curve: dict[int, float], colour: str, width: float) -> str:
        at = " ".join(
            f"{50 + 530 * step / last:.1f},{320 - 290 * value / top:.1f}" for step, value in sorted(curve.items())
        )
        return f'<polyline points="{at}" fill="none" stroke="{colour}" stroke-width="{width}"/>'

    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 600 360" font-family="sans-serif" font-size="12">']
    parts += ['<path d="M50 30V320H580" fill="none" stroke="#444"/>', f'<text x="8" y="36">{top:.0%}</text>']
    parts += ['<text x="28" y="324">0</text>', f'<text x="540" y="340">step {last}</text>']
    for place, ((arm, seeds), colour) in enumerate(zip(curves.items(), COLOURS, strict=False)):
        shared = [step for step in steps if seeds and all(step in seed for seed in seeds)]
        parts += [line(seed, colour, 0.6) for seed in seeds]
        parts.append(line({step: statistics.mean(seed[step] for seed in seeds) for step in shared}, colour, 2.4))
        parts.append(f'<text x="{60 + 150 * place}" y="18" fill="{colour}">{arm}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--study", choices=list(STUDIES), default="game")
    parser.add_argument(
        "--config",
        default="",
        help="empty: SmolLM2 on Wikipedia leads; with --smoke or of `precision` the demo's policy",
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="no run is begun after so long; the same command goes on"
    )
    parser.add_argument("--server-python", default="")
    given = parser.parse_args()
    on = device(given.smoke)
    given.config = given.config or CONFIGS["precision" if given.smoke else given.study]
    if given.smoke:
        given.seeds, given.steps = 1, 2
    part = "curve" if given.study == "game" else f"curve_{given.study}"
    arms, runs = STUDIES[given.study], given.out.resolve() / part
    record = Record(given.out, part, machine(on, given.server_python) | {"config": given.config, "steps": given.steps})
    deadline, reason = time.monotonic() + 60 * given.minutes, ""
    for seed in range(given.seeds):  # all arms of a seed before the next: what there is can always be compared
        for arm in arms:
            run_dir = runs / f"{arm}-{seed}"
            if (run_dir / "report.html").is_file():
                continue
            if fault := unrun(arm, given, on.type == "cuda"):
                reason = f"{arm}: {fault}"
                continue
            if time.monotonic() > deadline:
                reason = OUT_OF_TIME
                continue
            fault = ran(command(arm, seed, run_dir, given, on.type == "cuda"), deadline)
            reason = f"{arm}, seed {seed}: {fault}" if fault else reason
    all_curves = {}
    for name in ("fixed_masks", "held_out"):
        found = {
            arm: [numbers(runs / f"{arm}-{seed}", METRIC.format(name)) for seed in range(given.seeds)] for arm in arms
        }
        curves = {arm: [curve for curve in seeds if len(curve) > 1] for arm, seeds in found.items()}
        all_curves[name] = curves
        for arm, seeds in curves.items():
            rises = [curve[max(curve)] - curve[min(curve)] for curve in seeds]
            text = (
                f"{statistics.mean(rises):+.1%} over {len(rises)} seeds ({min(rises):+.1%} to {max(rises):+.1%})"
                if rises
                else ""
            )
            record.add(
                {
                    "what": f"{arm}, {name}: accuracy, end less beginning",
                    "measured": text,
                    "reason": reason or "no score",
                }
            )
        (given.out / f"{part}_{name}.svg").write_text(plot(curves), encoding="utf-8")
    for arm in arms:
        gaps = [gap for seed in range(given.seeds) for gap in numbers(runs / f"{arm}-{seed}", GAP).values()]
        if gaps:
            told = f"{statistics.mean(gaps):.2g} a token over {len(gaps)} steps"
            record.add({"what": f"{arm}: {GAP}, engine beside trainer", "measured": told})
    for phase, most in peaks(runs).items():
        record.add({"what": f"trainer's peak memory, {phase}", "measured": f"{most / 2**30:.2f} GiB"})
    if reason:
        record.add({"what": "curve: the rest", "reason": reason})
    record.finish(curves=all_curves)


if __name__ == "__main__":
    main()
