"""A GRPO step of this program beside one of TRL's GRPOTrainer, on the same small model and the same prompts.

One process is one side for a few steps, one thread; sides take turns, round after round, so that whatever else the
machine does falls on all. Counted are CPU-seconds of the process (user and system) and its largest resident set. The
first step of a process warms up and is left out.

Usage: grpo_vs_trl.py [--rounds 4] [--steps 4] [--half] [--out benchmarks/records/grpo_vs_trl]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import records

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PROMPTS, GROUP, PROMPT_TOKENS, RESPONSE_TOKENS = 8, 8, 32, 128
TOKENS = PROMPTS * GROUP * RESPONSE_TOKENS
SHAPE = [str(number) for number in (PROMPTS, GROUP, PROMPT_TOKENS, RESPONSE_TOKENS)]

SIDES = {  # name: worker, what follows the shape
    "megatron_pz": ("our_worker.py", ["float32", "2048"]),
    "TRL": ("trl_worker.py", ["float32", "1"]),
    "TRL, 8 micro-batches": ("trl_worker.py", ["float32", "8"]),
}
HALF_SIDES = {
    "megatron_pz, bfloat16": ("our_worker.py", ["bfloat16", "2048"]),
    "TRL, bf16=True": ("trl_worker.py", ["bfloat16", "1"]),
}
PHASES = ("generate_cpu_s", "train_cpu_s", "total_cpu_s")

WORK = f"""\
Both sides, each step: {PROMPTS} prompts x {GROUP} completions, {PROMPT_TOKENS} prompt tokens, exactly {RESPONSE_TOKENS}
response tokens (no early stop), temperature 1, the same reward (parity of the first token), group-normalised
advantages, {TOKENS} trained tokens, one AdamW update at lr 1e-4, no KL term, no second model. Neither scores old
log-probs with a forward of its own: TRL takes the new ones, detached (its default with one update a batch); we take
those that the engine reported while sampling.
Apart they are in this: TRL tokenises and decodes text, and pads (here nothing needs padding); we take ids and pack
sequences into micro-batches of 2048 tokens. TRL's default is one batch of 64; its row in 8 micro-batches is shown
because smaller ones suit a CPU's caches, and the comparison is with the better of the two as well.
"""


def run_side(name: str, folder: Path, steps: int) -> dict:
    """What one fresh process of a side measured."""
    script, rest = (SIDES | HALF_SIDES)[name]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(HERE / script), str(folder), str(steps), *SHAPE, *rest]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{script} failed:\n{done.stderr[-3000:]}\n(TRL is installed by: make bench-env)")
    found = json.loads(done.stdout.splitlines()[-1])
    if found["generated_tokens"] != TOKENS:
        raise SystemExit(f"{name} generated {found['generated_tokens']} tokens, not {TOKENS}: no like comparison")
    return found | {"total_cpu_s": found["generate_cpu_s"] + found["train_cpu_s"]}


def mean(runs: list[dict], key: str) -> float:
    """Mean of `key` over the rounds."""
    return statistics.fmean(run[key] for run in runs)


def ratios(runs: dict[str, list[dict]], ours: str, theirs: str) -> dict[str, float]:
    """Our total over theirs, each round against its own: mean, least and most; and of the phases, the mean."""
    found = {
        phase: [mine[phase] / other[phase] for mine, other in zip(runs[ours], runs[theirs], strict=True)]
        for phase in PHASES
    }
    total = found["total_cpu_s"]
    means = {phase.removesuffix("_cpu_s"): statistics.fmean(values) for phase, values in found.items()}
    return {**means, "total_least": min(total), "total_most": max(total)}


def main() -> None:
    """Measure, print the table, write the records."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4, help="of a process; the first is not counted")
    parser.add_argument("--half", action="store_true", help="also the bfloat16 rows")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/records/grpo_vs_trl")
    arguments = parser.parse_args()
    sides = [*SIDES, *(HALF_SIDES if arguments.half else ())]
    runs: dict[str, list[dict]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        subprocess.run([sys.executable, str(HERE / "small_model.py"), str(folder)], check=True, timeout=300)
        for number in range(arguments.rounds):
            order = sides if number % 2 == 0 else sides[::-1]
            for name in order:
                found = run_side(name, folder, arguments.steps)
                runs[name].append(found)
                print(f"round {number + 1}: {name}: {found['total_cpu_s']:.2f} CPU-s a step", flush=True)
    compared = {theirs: ratios(runs, "megatron_pz", theirs) for theirs in SIDES if theirs != "megatron_pz"}
    if arguments.half:
        compared["bfloat16"] = ratios(runs, *HALF_SIDES)
    record = {
        **records.here(),
        "versions": {name: version(name) for name in ("torch", "megatron-core", "transformers", "trl")},
        "shape": dict(zip(("prompts", "group", "prompt_tokens", "response_tokens"), map(int, SHAPE), strict=True)),
        "rounds": runs,
        "ratios": compared,
    }
    table = tabulated(runs, compared)
    about = f"{record['date']}, {record['cpu']}, one thread; " + ", ".join(
        f"{name} {number}" for name, number in record["versions"].items()
    )
    text = f"# A GRPO step beside TRL's\n\n{about}; {arguments.rounds} rounds, sides by turns, in one run.\n\n{table}\n{WORK}"
    records.write(arguments.out, record, text)
    print("\n" + table)


def tabulated(runs: dict[str, list[dict]], compared: dict[str, dict[str, float]]) -> str:
    """The table that is printed last, in Markdown."""
    lines = [
        "| CPU-seconds a step (mean, least to most) | generate | train | total | peak memory |",
        "|---|---|---|---|---|",
    ]
    for name, found in runs.items():
        cells = [
            f"{mean(found, phase):.2f} ({min(r[phase] for r in found):.2f} to {max(r[phase] for r in found):.2f})"
            for phase in PHASES
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {mean(found, 'peak_rss_bytes') / 1e9:.2f} GB |")
    lines += [
        "",
        "| ours / theirs, round by round | generate | train | total | spread of total |",
        "|---|---|---|---|---|",
    ]
    for theirs, found in compared.items():
        lines.append(
            f"| {theirs} | {found['generate']:.2f} | {found['train']:.2f} | **{found['total']:.2f}** "
            f"| {found['total_least']:.2f} to {found['total_most']:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
