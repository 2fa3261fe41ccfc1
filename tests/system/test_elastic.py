"""torchrun's restarts: a rank that is killed costs the steps since the newest checkpoint, and nothing of the first start stays."""

import os
import signal
import time

import pytest
from demo_runs import arguments, checkpoints, rows, tiny_policy, write_text
from torchrun_runs import end, environments, metrics, num_rows, of_start, rank_process, saved, start, wait_until

PROGRAM = ("-m", "megatron_pz")


@pytest.fixture
def started():
    """Everything in this list is gone after the test."""
    runs = []
    yield runs
    end(runs)


@pytest.mark.timeout(600)  # three starts of two ranks
def test_a_killed_rank_costs_a_restart_and_changes_no_number(tmp_path, started):
    corpus = write_text(tmp_path / "text.jsonl")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    steps = {"train_iters": 6, "save_interval": 2}
    undisturbed = start(whole, [*PROGRAM, *arguments(whole, corpus, **steps)])
    started.append((undisturbed, whole))
    assert undisturbed.wait(280) == 0, (whole / "out").read_text()[-4000:]
    process = start(killed, [*PROGRAM, *arguments(killed, corpus, **steps)])
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
    assert metrics(killed) == metrics(whole)  # to the last bit
    assert [row["step"] for row in rows(killed)] == [1, 2, 3, 4, 5, 6]
    assert any(row.get("loss") for row in rows(whole)), "no step learned anything"
    assert checkpoints(killed) == ["step_000004", "step_000006"]
    assert not environments(killed)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_trainer_killed_alone_leaves_no_process(tmp_path, started, is_async):
    folder = tmp_path / "run"
    process = start(folder, [*PROGRAM, *_short(tmp_path, folder, async_save=is_async)], nproc=1, max_restarts=0)
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
    process = start(folder, [*PROGRAM, *_short(tmp_path, folder)], nproc=1, max_restarts=0)
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


def _short(tmp_path, run_dir, **more):
    """A run of quick steps, without end, that saves after each few."""
    flags = {"task": "continue_pt", "hf_model": tiny_policy(tmp_path / "policy"), "init": "random", "save_interval": 20}
    return arguments(run_dir, write_text(tmp_path / "text.jsonl"), **flags, **more, train_iters=100_000)
