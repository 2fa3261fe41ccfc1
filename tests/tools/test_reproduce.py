"""tools/reproduce.py: a run is made again to the last bit, and what is not the same is told."""

import json
import subprocess
import sys

import pytest
from demo_runs import ROOT, run, write_text


def reproduce(*arguments):
    command = [sys.executable, str(ROOT / "tools" / "reproduce.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.timeout(300)
def test_a_run_is_made_again_and_an_altered_record_is_found(tmp_path):
    corpus = write_text(tmp_path / "text.jsonl")
    # Under the cosine the learning rates of the first steps depend on how many were to come.
    flags = {"train_iters": 4, "eval_interval": 1, "lr": 1e-3, "min_lr": 0.0, "lr_decay_style": "cosine"}
    assert run(tmp_path / "run", corpus, **flags) == 0
    done = reproduce(tmp_path / "run", "--steps", 2)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "the same up to step 2"
    assert "other grounds" not in done.stdout

    about = json.loads((tmp_path / "run" / "run.json").read_text())
    about["versions"]["torch"] = "1.0"
    (tmp_path / "run" / "run.json").write_text(json.dumps(about))
    metrics = tmp_path / "run" / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    rows[1]["lr"] = 5.0
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = reproduce(tmp_path / "run", "--steps", 1, "--out", tmp_path / "again")
    assert done.returncode == 1
    assert "other grounds: versions of torch: was 1.0, is 2." in done.stdout
    assert "differs: metrics.jsonl, row 2 (step 1), lr: was 5.0, is 0.001" in done.stdout
    assert done.stdout.splitlines()[-1] == "NOT the same up to step 1"
    assert (tmp_path / "again" / "metrics.jsonl").is_file()


def test_a_folder_that_is_no_run_is_named(tmp_path):
    done = reproduce(tmp_path)
    assert done.returncode == 2 and "no readable run.json" in done.stderr
