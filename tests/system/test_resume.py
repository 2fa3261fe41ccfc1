"""The main job as a user runs it: stopped in several ways, it goes on as if it had never been stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from demo_runs import TEXT
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]
SMALL = [
    *("--paragraphs-per-step", "2", "--n-masks-per-paragraph", "4", "--n-predictions-per-mask", "4"),
    *("--num-fixed-masks", "4", "--held-out-path", "", "--eval-interval", "2", "--save-interval", "2"),
    *("--show-rollouts", "0", "--no-tensorboard", "--no-write-page"),
]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT), encoding="utf-8")
    return path


def command(corpus: Path, run_dir: Path, steps: int, *flags: str) -> list[str]:
    config = str(ROOT / "examples" / "demo.toml")
    paths = ["--data-path", str(corpus), "--run-dir", str(run_dir), "--train-iters", str(steps)]
    return ["-m", "megatron_pz", config, *paths, *SMALL, *flags]


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """The run in a session of its own; what it says goes into a file, for its helpers may outlive a kill."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("wb") as out:
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=env,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def run(arguments: list[str], log: Path, code: int = 0) -> str:
    return finish(start(arguments, log), log, code)


def finish(process: subprocess.Popen[bytes], log: Path, code: int = 0) -> str:
    process.wait(timeout=240)
    told = log.read_text(encoding="utf-8")
    assert process.returncode == code, told[-3000:]
    return told


def metrics(run_dir: Path) -> list[dict[str, float]]:
    """Rows of metrics.jsonl without what the clock says."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in rows]


def wait_for_step(process: subprocess.Popen[bytes], run_dir: Path, step: int) -> None:
    file = run_dir / "metrics.jsonl"
    for _ in range(1200):
        if file.exists() and len(file.read_bytes().splitlines()) > step:  # one line a step, from step 0
            return
        assert process.poll() is None, "the run ended early"
        time.sleep(0.1)
    raise AssertionError(f"step {step} was not reached")


def test_a_killed_run_ends_with_the_numbers_of_one_that_was_never_stopped(corpus: Path, tmp_path: Path) -> None:
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    run(command(corpus, whole, 5), log)
    process = start(command(corpus, killed, 5), log)
    wait_for_step(process, killed, 3)  # after the checkpoint of step 2, anywhere in what follows
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert "continuing after step" in run(command(corpus, killed, 5), log)
    assert metrics(killed) == metrics(whole)  # to the last bit
    assert (killed / "rollouts.jsonl").read_text() == (whole / "rollouts.jsonl").read_text()
    assert len(metrics(whole)) == 6  # step 0 scores the fixed masks
    assert any(row.get("loss") for row in metrics(whole)), "no step learned anything"
    model = AutoModelForCausalLM.from_pretrained(killed / "hf")
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_172_544


def test_sigterm_saves_the_step_and_ends_well(corpus: Path, tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    process = start(command(corpus, run_dir, 1000, "--save-interval", "0"), log)
    wait_for_step(process, run_dir, 1)
    process.send_signal(signal.SIGTERM)
    finish(process, log)
    last = metrics(run_dir)[-1]["step"]
    assert (run_dir / "checkpoints" / f"step_{int(last):06d}").is_dir()


def test_a_damaged_checkpoint_is_refused_by_name(corpus: Path, tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    run(command(corpus, run_dir, 2), log)
    shard = next((run_dir / "checkpoints" / "step_000002" / "shards").glob("*.distcp"))
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)
    told = run(command(corpus, run_dir, 3), log, code=2)
    assert "CheckpointError" in told
    assert shard.name in told
    assert "altered" in told
