"""tools/evaluate.py from its arguments to its files: the demo policy under the embedded engine, killed and gone on with."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from demo_runs import ROOT, rows, run, tiny_policy, write_text
from evaluate_samples import GSM8K, MMLU_PRO, write_sets

TOOL = [sys.executable, str(ROOT / "tools" / "evaluate.py")]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
POLICY = str(ROOT / "examples" / "demo_policy")


def evaluate(*arguments, **more):
    return subprocess.run(
        [*TOOL, *map(str, arguments)],
        cwd=ROOT,
        env=ENV,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        **more,
    )


def test_a_killed_evaluation_goes_on_where_it_was(tmp_path):
    sets, out = (
        write_sets(tmp_path / "sets", mmlu_pro=MMLU_PRO * 1, gsm8k=[{**GSM8K[0], "id": i} for i in range(40)]),
        tmp_path / "out",
    )
    arguments = [
        "--out",
        out,
        "--suites",
        "mmlu_pro,gsm8k",
        "--data",
        sets,
        "--hf-model",
        POLICY,
        "--prompt-style",
        "plain",
    ]
    arguments += ["--max-new-tokens", "200", "--samples", "gsm8k=2", "--at-once", "1"]
    begun = subprocess.Popen(
        [*TOOL, *map(str, arguments)], cwd=ROOT, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    kept = out / "responses.jsonl"
    end = time.monotonic() + 150
    while time.monotonic() < end and (not kept.exists() or kept.read_bytes().count(b"\n") < 3):
        assert begun.poll() is None
        time.sleep(0.05)
    begun.send_signal(signal.SIGKILL)
    begun.wait()
    before = kept.read_bytes()[: kept.read_bytes().rfind(b"\n") + 1]
    assert 3 <= before.count(b"\n") < 82 and not (out / "evaluation.json").exists()
    done = evaluate(*arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert kept.read_bytes().startswith(before) and kept.read_bytes().count(b"\n") == 2 + 80
    found = json.loads((out / "evaluation.json").read_text())["models"][0]
    assert {name: suite["num_questions"] for name, suite in found["suites"].items()} == {"mmlu_pro": 2, "gsm8k": 40}
    assert set(found["suites"]["gsm8k"]["scores"]) == {"qwen", "math_verify"}
    assert len(rows(out, "graded.jsonl")) == 82
    assert "gsm8k (mean@2) | qwen" in (out / "table.md").read_text() and "gsm8k (mean@2) | qwen" in done.stdout


def test_checkpoints_of_a_run_make_curves(tmp_path):
    policy = tiny_policy(tmp_path / "policy")
    flags = {
        "hf_model": policy,
        "init": "random",
        "train_iters": 2,
        "save_interval": 1,
        "keep": 2,
        "task": "continue_pt",
    }
    assert run(tmp_path / "run", write_text(tmp_path / "text.jsonl"), **flags, lr=1e-2) == 0
    out = tmp_path / "out"
    sets = write_sets(tmp_path / "sets", mmlu_pro=MMLU_PRO)
    done = evaluate(
        "--out", out, "--suites", "mmlu_pro", "--data", sets, "--run-dir", tmp_path / "run", "--max-new-tokens", 8
    )
    assert done.returncode == 0, done.stderr[-3000:]
    models = json.loads((out / "evaluation.json").read_text())["models"]
    assert [(model["label"], model["step"]) for model in models] == [("step_000001", 1), ("step_000002", 2)]
    assert models[0]["model"] != models[1]["model"] and len(rows(out, "responses.jsonl")) == 4
    assert (out / "curves.svg").read_text().startswith("<svg")
    done = evaluate("--out", out, "--suites", "mmlu_pro", "--data", sets, "--run-dir", tmp_path / "run", "--steps", "7")
    assert done.returncode == 2 and "no checkpoint of step [7]" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--suites", "gsm9k", "--hf-model", POLICY], "no test set 'gsm9k'"),
        (["--suites", "gsm8k", "--samples", "8", "--hf-model", POLICY], "--samples is '8'"),
        (
            ["--suites", "gsm8k", "--hf-model", POLICY, "--", "--pipeline-model-parallel-size", "2"],
            "1 ranks cannot be shared out",
        ),
        (["--suites", "gsm8k", "--hf-model", "/no/such/folder"], "does not exist"),
    ],
)
def test_what_cannot_be_done_is_told(tmp_path, arguments, told):
    done = evaluate("--out", tmp_path / "out", "--data", write_sets(tmp_path / "sets"), *arguments)
    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr
