"""Variants of one run beside each other: same policy, same questions, same number of tokens; one table and one figure.

    python tools/compare.py COMPARISON.toml --out DIR [--jobs N] [--no-run] [--flag value ...]

    base = "demo.toml"                 # a run's settings, seen from this file
    seeds = [0, 1, 2]
    reference = "control"              # gains are measured against it
    launch = "torchrun --nproc-per-node 8"      # optional; one process without it
    [variants.pretrain_zero]           # settings by their names; flags given on the command line are for all
    [variants.random_span]
    task = "random_span"
    [variants.format_only]             # paid for any answer: what the others gain over it is told as "beyond format"
    task = "format_only"
    [variants.control]                 # learns nothing: a few steps show it, and the budget of the others stays
    lr = 0.0
    min_lr = 0.0
    train_iters = 2

Runs lie in DIR/VARIANT/seed_N and go on where they stopped if the command is given again; DIR/comparison.md, comparison.json and one
figure a set of questions are written after each (needs matplotlib: pip install "megatron_pz[plots]"). --no-run writes them from
the runs that are there; those that are not at their end are named under the table. On a CPU a run computes with one thread:
--jobs 2 keeps two cores busy, and what the runs print goes to DIR/VARIANT/seed_N.log (not with `launch`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_pz.config.load import load_config
from megatron_pz.errors import ConfigError, MegatronPZError, ReportError
from megatron_pz.report.comparison import Run, budget, compare, last_step, markdown, read_run
from megatron_pz.report.figure import draw, need_matplotlib

SETS = ("fixed_masks", "held_out")
KEYS = {"base", "seeds", "reference", "launch", "variants"}
ONE_PROCESS = shlex.quote(sys.executable)
PlannedRun = tuple[str, int, Path]  # variant, seed, folder


def main(argv: Sequence[str]) -> int:
    """See the module; 0 when every run is done, 1 after one that failed, 2 after an error that a user can mend."""
    parser = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False)
    parser.add_argument("comparison", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side; 1 by default")
    parser.add_argument("--no-run", action="store_true", help="write table and figures from the runs that are there")
    own, flags = parser.parse_known_args(list(argv))
    try:
        if own.jobs < 1:
            raise ConfigError(f"--jobs is {own.jobs}; it must be at least 1, the number of runs side by side.")
        plan = read_plan(own.comparison)
        if own.jobs > 1 and "launch" in plan:
            raise ConfigError(
                f"--jobs is {own.jobs} and {own.comparison} has launch = {plan['launch']!r}: runs side by side would share its "
                "devices and its port. Leave --jobs out."
            )
        base = own.comparison.parent / plan["base"]
        runs = [
            (variant, seed, own.out / variant / f"seed_{seed}")
            for seed in plan["seeds"]
            for variant in plan["variants"]
        ]
        commands = {folder: _command(base, plan, variant, seed, folder, flags) for variant, seed, folder in runs}
        # A slip in the last variant is told before the first one has run, and so is a figure that could not be drawn after it.
        need_matplotlib()
        configs = {variant: load_config(commands[folder]) for variant, _, folder in runs}
        format_control = next((name for name, config in configs.items() if config.task.task == "format_only"), None)
        idle = {name for name, config in configs.items() if config.train.lr == 0}
        lengths = {folder: configs[variant].train.train_iters for variant, _, folder in runs}
        finished = [runs] if own.no_run else _run_all(runs, plan.get("launch", ONE_PROCESS), commands, own.jobs)
        for done in finished:
            table = report(done, lengths, plan["reference"], own.out, format_control, idle)
        sys.stdout.write(table)
    except MegatronPZError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 2
    except subprocess.CalledProcessError:
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("stopped: the same command goes on where the runs are\n")
        return 130
    return 0


def read_plan(path: Path) -> dict[str, Any]:
    """The comparison in the TOML file at `path`, defaults filled in.

    Raises:
        ConfigError: it is missing, not TOML, or lacks a key.
    """
    try:
        plan = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as TOML: {error}. examples/comparisons/demo.toml is one.") from error
    if unknown := sorted(plan.keys() - KEYS):
        raise ConfigError(f"{path}: unknown key {unknown[0]!r}; known are {', '.join(sorted(KEYS))}.")
    variants = plan.get("variants") or {}
    if not variants or not isinstance(plan.get("base"), str):
        raise ConfigError(f'{path} needs base = "run.toml" and at least one table [variants.NAME].')
    reference = plan.setdefault("reference", next(iter(variants)))
    if reference not in variants:
        raise ConfigError(f"{path}: reference is {reference!r}; it must be one of {', '.join(variants)}.")
    plan.setdefault("seeds", [1234])
    return plan


def _run_all(
    runs: Sequence[PlannedRun], launch: str, commands: Mapping[Path, Sequence[str]], jobs: int
) -> Iterator[list[PlannedRun]]:
    """Run all, `jobs` at a time; after each those that are done, in their order.

    Raises:
        subprocess.CalledProcessError: one failed, which is told at once. Those beside it have ended, those after it were not begun.
    """

    def run(place: int) -> int:
        folder, log = runs[place][2], _log(runs[place])
        sys.stdout.write(f"run {place + 1} of {len(runs)}: {_name(runs[place])}, in {log if jobs > 1 else folder}\n")
        sys.stdout.flush()
        command = [*shlex.split(launch), "-m", "megatron_pz", *commands[folder]]
        if jobs == 1:
            return subprocess.run(command, check=False).returncode
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            return subprocess.run(command, check=False, stdout=output, stderr=subprocess.STDOUT).returncode

    waiting = iter(range(len(runs)))
    running: dict[Future[int], int] = {}
    done: set[int] = set()
    failed = 0
    with ThreadPoolExecutor(jobs) as pool:
        while True:
            if not failed:
                running |= {pool.submit(run, place): place for place in islice(waiting, jobs - len(running))}
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                place = running.pop(future)
                if status := future.result():
                    failed = status
                    where = f" What it printed is in {_log(runs[place])}." if jobs > 1 else ""
                    sys.stderr.write(f"{_name(runs[place])}, failed with {status}.{where}\n")
                    sys.stderr.flush()
                else:
                    done.add(place)
            if done:
                yield [runs[place] for place in sorted(done)]
    if failed:
        raise subprocess.CalledProcessError(failed, launch)


def report(
    runs: Sequence[PlannedRun],
    lengths: Mapping[Path, int],
    reference: str,
    out: Path,
    format_control: str | None,
    idle: Collection[str],
) -> str:
    """Write `comparison.md`, `comparison.json` and the figures into `out`; the text of the first.

    Args:
        runs: those that have not begun are left out, and named as those that have not reached their `lengths`, in updates.
        format_control: the variant that is paid for format alone, if any.
        idle: variants that learn nothing. As that one they do not lower the budget.
    """
    steps = {run: last_step(run[2]) for run in runs}
    short = [
        f"{_name(run)} ({'not begun' if step is None else f'{step} of {lengths[run[2]]} updates'})"
        for run, step in steps.items()
        if step is None or step < lengths[run[2]]
    ]
    runs = [run for run in runs if steps[run] is not None]
    if not runs:
        raise ReportError(f"No run of this comparison has begun in {out}. Leave --no-run out.")
    unbudgeted = {*idle, *([format_control] if format_control else [])}
    parts, record = [], {}
    for questions in SETS:
        try:
            found = [read_run(variant, seed, folder, questions) for variant, seed, folder in runs]
        except ReportError:
            if questions == SETS[0]:
                raise
            continue
        there = {run.variant for run in found}
        form = format_control if format_control in there else None
        spent = budget(found, unbudgeted)
        against = reference if reference in there else found[0].variant
        rows = compare(found, against, questions, form, unbudgeted)
        parts.append(markdown(rows, spent, questions, unbudgeted))
        record[questions] = {
            "budget_tokens": spent,
            "rows": [dataclasses.asdict(row) for row in rows],
            "runs": [_described(run) for run in found],
        }
        draw(found, spent, out / f"{questions}.svg", questions.replace("_", " "))
    text = "\n".join(parts) + (f"\nNot at their end: {'; '.join(short)}.\n" if short else "")
    for name, content in (("comparison.md", text), ("comparison.json", json.dumps(record, indent=1) + "\n")):
        partial = out / f".tmp-{name}"
        partial.write_text(content, encoding="utf-8")
        partial.rename(out / name)
    return text


def _name(run: PlannedRun) -> str:
    return f"{run[0]}, seed {run[1]}"


def _log(run: PlannedRun) -> Path:
    """Where the output of one of several runs side by side goes."""
    return run[2].with_suffix(".log")


def _described(run: Run) -> dict[str, Any]:
    return {"variant": run.variant, "seed": run.seed, "points": [dataclasses.asdict(point) for point in run.points]}


def _command(
    base: Path, plan: Mapping[str, Any], variant: str, seed: int, folder: Path, flags: Sequence[str]
) -> list[str]:
    """Arguments of a run."""
    own: list[str] = []
    for name, value in plan["variants"][variant].items():
        flag = name.replace("_", "-")
        own += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return [str(base), *flags, *own, "--seed", str(seed), "--run-dir", str(folder)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
