"""torchrun's restarts: a rank that is killed costs the steps since the newest checkpoint, and nothing of the first start stays."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from demo_runs import ROOT, arguments, checkpoints, rows, tiny_policy, write_text

MARK = "PZ_TEST_RUN"


def start(run_dir, command, nproc=2, max_restarts=1):
    """torchrun with `command`'s arguments; all that it starts is told apart by its environment."""
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={nproc}",
        f"--max-restarts={max_restarts}",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), MARK: str(run_dir)}
    run_dir.mkdir(parents=True)
    with (run_dir / "out").open("wb") as out:
        return subprocess.Popen(
            [sys.executable, *torchrun, "-m", "megatron_pz", *command],
            cwd=ROOT,
            env=env,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def environments(run_dir):
    """Of every process of the run, by its id."""
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


def of_start(run_dir, count):
    """Processes of the ranks of start `count` (0: the first), by rank; the ranks' own children have the same environment."""
    found = {}
    for pid, given in environments(run_dir).items():
        if given.get("TORCHELASTIC_RESTART_COUNT") == str(count):
            found.setdefault(int(given["RANK"]), []).append(pid)
    return found


def rank_process(torchrun, rank):
    """Process id of the rank itself, which is torchrun's child."""
    children = psutil.Process(torchrun.pid).children()
    return next(child.pid for child in children if child.environ().get("RANK") == str(rank))


def wait_until(is_so, process, run_dir, timeout_s=200.0):
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert process.poll() is None, (run_dir / "out").read_text()[-4000:]
        assert time.monotonic() < deadline, (run_dir / "out").read_text()[-4000:]
        time.sleep(0.05)


def num_rows(run_dir):
    file = run_dir / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def saved(run_dir):
    """Whole checkpoints."""
    folder = run_dir / "checkpoints"
    return [name for name in checkpoints(run_dir) if name.startswith("step_")] if folder.exists() else []


def without_clock(run_dir):
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in rows(run_dir)]


@pytest.fixture
def started():
    """Everything in this list is gone after the test."""
    runs = []
    yield runs
    for process, run_dir in runs:
        process.kill()
        process.wait()
        for pid in environments(run_dir):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.timeout(600)  # three starts of two ranks
def test_a_killed_rank_costs_a_restart_and_changes_no_number(tmp_path, started):
    corpus = write_text(tmp_path / "text.jsonl")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    steps = {"train_iters": 6, "save_interval": 2}
    undisturbed = start(whole, arguments(whole, corpus, **steps))
    started.append((undisturbed, whole))
    assert undisturbed.wait(280) == 0, (whole / "out").read_text()[-4000:]
    process = start(killed, arguments(killed, corpus, **steps))
    started.append((process, killed))
    wait_until(lambda: num_rows(killed) >= 3, process, killed)  # after the checkpoint of step 2
    first = of_start(killed, 0)
    assert sorted(first) == [0, 1]
    os.kill(rank_process(process, 0), signal.SIGKILL)
    wait_until(lambda: len(of_start(killed, 1)) == 2, process, killed)
    left = {pid for rank in of_start(killed, 0).values() for pid in rank}
    assert not left, f"of the first start: {left}"
    assert process.wait(280) == 0, (killed / "out").read_text()[-4000:]
    told = (killed / "out").read_text()
    assert "torchrun has started the ranks again, time 1" in told
    assert "continuing after step" in told
    assert without_clock(killed) == without_clock(whole)  # to the last bit
    assert [row["step"] for row in rows(killed)] == [1, 2, 3, 4, 5, 6]
    assert any(row.get("loss") for row in rows(whole)), "no step learned anything"
    assert checkpoints(killed) == ["step_000004", "step_000006"]
    assert not environments(killed)


def test_a_trainer_killed_alone_leaves_no_process(tmp_path, started):
    folder = tmp_path / "run"
    process = start(folder, _short(tmp_path, folder), nproc=1, max_restarts=0)
    started.append((process, folder))
    wait_until(lambda: saved(folder), process, folder)
    rank = rank_process(process, 0)
    process.kill()  # torchrun first, so that it cleans nothing up
    os.kill(rank, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while left := environments(folder):
        assert time.monotonic() < deadline, left.keys()
        time.sleep(0.05)


def test_a_signal_to_all_processes_of_a_rank_lets_it_save(tmp_path, started):
    folder = tmp_path / "run"
    process = start(folder, _short(tmp_path, folder), nproc=1, max_restarts=0)
    started.append((process, folder))
    wait_until(lambda: saved(folder), process, folder)
    before = saved(folder)
    for number in (signal.SIGUSR1, signal.SIGTERM):  # as Slurm's scancel tells every process of a step
        for pid in of_start(folder, 0)[0]:
            os.kill(pid, number)
    assert process.wait(120) == 0, (folder / "out").read_text()[-4000:]
    last = int(rows(folder)[-1]["step"])
    assert saved(folder)[-1] == f"step_{last:06d}" != before[-1]
    assert "the same command goes on from there" in (folder / "out").read_text()


def _short(tmp_path, run_dir):
    """A run of quick steps, without end, that saves after each few."""
    flags = {"task": "continue_pt", "hf_model": tiny_policy(tmp_path / "policy"), "init": "random", "save_interval": 20}
    return arguments(run_dir, write_text(tmp_path / "text.jsonl"), **flags, train_iters=100_000)
