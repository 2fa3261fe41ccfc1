"""tools/compare.py: real small runs, one table and one figure."""

import json
import subprocess
import sys

import pytest
from demo_runs import ROOT, rows, write_text

PLAN = """
base = "{root}/examples/demo.toml"
seeds = [1]
reference = "control"
[variants.pretrain_zero]
[variants.paid_for_format]
task = "format_only"
[variants.control]
lr = 0.0
train_iters = 1
"""
SMALL = "--train-iters 2 --paragraphs-per-step 2 --n-masks-per-paragraph 4 --n-predictions-per-mask 4 --eval-interval 1"
QUIET = "--num-fixed-masks 4 --save-interval 0 --no-export-hf --no-tensorboard --no-write-page --show-rollouts 0"


def compare(folder, plan, *more):
    corpus = write_text(folder / "text.jsonl")
    (folder / "plan.toml").write_text(plan.format(root=ROOT), encoding="utf-8")
    flags = [*SMALL.split(), *QUIET.split(), "--data-path", str(corpus), "--held-out-path", str(corpus), *more]
    command = [
        sys.executable,
        str(ROOT / "tools" / "compare.py"),
        str(folder / "plan.toml"),
        "--out",
        str(folder / "out"),
    ]
    return subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.timeout(300)
def test_variants_are_run_from_one_policy_and_put_into_one_table(tmp_path):
    done = compare(tmp_path, PLAN)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    table = (out / "comparison.md").read_text(encoding="utf-8")
    assert done.stdout.endswith(table) and table.count("| control | 1 |") == 2  # fixed masks and held out
    record = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    first, form, control = record["fixed_masks"]["rows"]
    assert (first["steps"], control["steps"]) == (2, 1)  # what learns nothing may stop early
    assert "but those of paid_for_format and control: at most" in table
    assert first["before"] == control["before"] == control["after"]  # the same policy, and one that learns nothing
    assert (
        first["beyond_format"] is not None and form["beyond_format"] is None
    )  # the task tells which is paid for format
    assert table.count("beyond format (95%)") == 2
    played = rows(out / "paid_for_format" / "seed_1", "rollouts.jsonl")
    assert {row["reward"] for row in played} <= {0.0, 1.0}
    assert all(row["reward"] == (row["valid"] and bool(row["answer"])) for row in played)
    asked = rows(out / "paid_for_format" / "seed_1", "eval.jsonl")
    assert all(row["reward"] == (row["answer"] == row["target"]) for row in asked)  # it is examined as all are
    assert {row["lr"] for row in rows(out / "control" / "seed_1") if "lr" in row} == {0.0}
    assert (out / "fixed_masks.svg").is_file() and (out / "held_out.svg").is_file()

    before = (out / "comparison.json").read_bytes()
    assert compare(tmp_path, PLAN, "--no-run").returncode == 0
    assert (out / "comparison.json").read_bytes() == before
    done = compare(tmp_path, PLAN.replace("[1]", "[1, 2]"), "--no-run", "--train-iters", "3")
    assert (out / "comparison.json").read_bytes() == before  # of the runs that are there
    assert "Not at their end: pretrain_zero, seed 1 (2 of 3 updates); " in done.stdout
    assert "control, seed 1 (" not in done.stdout and "control, seed 2 (not begun)." in done.stdout


@pytest.mark.timeout(300)
def test_runs_side_by_side_give_the_same_table(tmp_path):
    done = compare(tmp_path, PLAN, "--jobs", "2")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    assert done.stdout.endswith((out / "comparison.md").read_text(encoding="utf-8")) and "step 1/2" not in done.stdout
    assert "step 1/2" in (out / "pretrain_zero" / "seed_1.log").read_text(encoding="utf-8")
    record = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    assert [row["variant"] for row in record["fixed_masks"]["rows"]] == ["pretrain_zero", "paid_for_format", "control"]


def test_a_run_that_fails_ends_the_comparison(tmp_path):
    done = compare(tmp_path, PLAN, "--jobs", "2", "--hf-model", str(tmp_path / "none"))
    assert done.returncode == 1 and "run 3 of 3" not in done.stdout
    log = tmp_path / "out" / "pretrain_zero" / "seed_1.log"
    assert f"pretrain_zero, seed 1, failed with 2. What it printed is in {log}." in done.stderr
    assert "ModelError" in (tmp_path / "out" / "pretrain_zero" / "seed_1.log").read_text(encoding="utf-8")
    done = compare(tmp_path, 'launch = "torchrun"\n' + PLAN, "--jobs", "2")
    assert done.returncode == 2 and "has launch = 'torchrun'" in done.stderr
    done = compare(tmp_path, PLAN, "--jobs", "0")
    assert done.returncode == 2 and "--jobs is 0; it must be at least 1" in done.stderr


def test_a_slip_in_any_variant_is_told_before_the_first_run(tmp_path):
    done = compare(tmp_path, PLAN + "lrr = 1\n")
    assert done.returncode == 2 and "--lrr" in done.stderr and not (tmp_path / "out").exists()
    done = compare(tmp_path, PLAN.replace('"control"', '"other"'))
    assert (
        done.returncode == 2
        and "reference is 'other'; it must be one of pretrain_zero, paid_for_format, control" in done.stderr
    )
    done = compare(tmp_path, PLAN.replace("seeds", "seed"))
    assert done.returncode == 2 and "unknown key 'seed'" in done.stderr


def test_missing_matplotlib_is_told_before_the_first_run(tmp_path, monkeypatch):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('none here')\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    done = compare(tmp_path, PLAN)
    assert done.returncode == 2 and "run 1 of" not in done.stdout and not (tmp_path / "out").exists()
    assert f"{sys.executable} -m pip install 'megatron_pz[plots]'" in done.stderr
