"""Runs under torchrun that lose ranks, and what is told apart of them while they go.

process = start(run_dir, ["-m", "megatron_pz", *arguments(...)])     a fixture `started` ends what a test leaves
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil
from demo_runs import ROOT, checkpoints, rows

MARK = "PZ_TEST_RUN"
Run = subprocess.Popen[bytes]


def start(
    run_dir: Path, program: Sequence[str], nproc: int = 2, max_restarts: int = 1, **variables: str
) -> subprocess.Popen[bytes]:
    """torchrun with `program`; all that it starts is told apart by its environment. Its words are in `run_dir`/out."""
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={nproc}",
        f"--max-restarts={max_restarts}",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), MARK: str(run_dir), **variables}
    run_dir.mkdir(parents=True)
    with (run_dir / "out").open("wb") as out:
        return subprocess.Popen(
            [sys.executable, *torchrun, *program],
            cwd=ROOT,
            env=env,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def end(runs: Sequence[tuple[Run, Path]]) -> None:
    """Nothing is left of `runs`."""
    for process, run_dir in runs:
        process.kill()
        process.wait()
        for pid in environments(run_dir):
            os.kill(pid, signal.SIGKILL)


def environments(run_dir: Path) -> dict[int, Mapping[str, str]]:
    """Of every process of the run, servers included, by its id."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                pairs = (entry / "environ").read_text(errors="replace").split("\0")
            except OSError:  # another user's, or gone
                continue
            given = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
            if given.get(MARK) == str(run_dir):
                found[int(entry.name)] = given
    return found


def of_start(run_dir: Path, count: int) -> dict[int, list[int]]:
    """Processes of the ranks of start `count` (0: the first), by rank; the ranks' own children have the same environment,
    but for servers."""
    found: dict[int, list[int]] = {}
    for pid, given in environments(run_dir).items():
        if given.get("TORCHELASTIC_RESTART_COUNT") == str(count):
            found.setdefault(int(given["RANK"]), []).append(pid)
    return found


def rank_process(torchrun: Run, rank: int) -> int:
    """Process id of the rank itself, which is torchrun's child."""
    children = psutil.Process(torchrun.pid).children()
    return next(child.pid for child in children if child.environ().get("RANK") == str(rank))


def wait_until(is_so: Callable[[], bool], process: Run, run_dir: Path, timeout_s: float = 200.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert process.poll() is None, (run_dir / "out").read_text()[-4000:]
        assert time.monotonic() < deadline, (run_dir / "out").read_text()[-4000:]
        time.sleep(0.05)


def num_rows(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def saved(run_dir: Path) -> list[str]:
    """Whole checkpoints."""
    folder = run_dir / "checkpoints"
    return [name for name in checkpoints(run_dir) if name.startswith("step_")] if folder.exists() else []


def without_clock(found: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Rows of metrics.jsonl without seconds and bytes."""
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in found]


def metrics(run_dir: Path) -> list[dict[str, float]]:
    """Of the steps on record, without seconds and bytes."""
    return without_clock(rows(run_dir)) if num_rows(run_dir) else []
