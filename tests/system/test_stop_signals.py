"""A run that is asked to stop saves the step it has done, whatever the signal, and goes on from there."""

import os
import signal
import threading
import time

import pytest
from demo_runs import checkpoints, rows, run, tiny_policy, write_text


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_ends_the_run_well(tmp_path, number, capsys):
    folder, corpus = tmp_path / "run", write_text(tmp_path / "text.jsonl")
    settings = {"task": "continue_pt", "hf_model": tiny_policy(tmp_path / "policy"), "init": "random"}
    metrics = folder / "metrics.jsonl"

    def send():
        while not (metrics.is_file() and metrics.read_bytes().count(b"\n") >= 2):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    assert run(folder, corpus, **settings, train_iters=100_000) == 0
    sender.join()
    last = int(rows(folder)[-1]["step"])
    assert 2 <= last < 100_000
    assert checkpoints(folder) == [f"step_{last:06d}"]
    assert run(folder, corpus, **settings, train_iters=last + 1) == 0
    assert f"continuing after step {last}" in capsys.readouterr().out
    assert [row["step"] for row in rows(folder)] == list(range(1, last + 2))
