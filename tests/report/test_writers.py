"""All records of a run at once: JSON lines, TensorBoard read back by TensorBoard, Weights & Biases only when asked."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_pz.errors import ConfigError, DiskError, ReportError
from megatron_pz.report import writers
from megatron_pz.report.writers import RunWriter

ROOT = Path(__file__).parents[2]

# Stands where wandb would be installed: it writes down how it was called.
STAND_IN = """
import json, pathlib
LOG = pathlib.Path(__file__).with_name("calls.jsonl")
def put(*row): LOG.open("a").write(json.dumps(row) + "\\n")
class Run:
    id = "abc123"
    def log(self, values, step): put("log", values, step)
    def finish(self): put("finish")
def init(**arguments):
    put("init", {k: v for k, v in arguments.items() if k != "dir"})
    return Run()
"""


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def scalars(run_dir):
    events = EventAccumulator(str(run_dir / "logs" / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, round(e.value, 5)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_step_stands_in_every_record(tmp_path):
    writer = RunWriter(tmp_path)
    writer.metrics(1, {"loss": 0.25, "reward/mask/mean": 0.5})
    writer.metrics(2, {"loss": math.nan, "reward/mask/mean": 0.75})
    writer.rollouts([{"step": 1, "role": "mask"}, {"step": 1, "role": "prediction"}])
    writer.evaluation([{"step": 1, "set": "held_out"}])
    writer.close()
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 0.25, "reward/mask/mean": 0.5},
        {"step": 2, "loss": None, "reward/mask/mean": 0.75},
    ]
    assert [row["role"] for row in lines(tmp_path / "rollouts.jsonl")] == ["mask", "prediction"]
    assert lines(tmp_path / "eval.jsonl") == [{"step": 1, "set": "held_out"}]
    assert scalars(tmp_path) == {"loss": [(1, 0.25)], "reward/mask/mean": [(1, 0.5), (2, 0.75)]}


def test_an_unknown_metric_is_refused_before_anything_is_written(tmp_path):
    writer = RunWriter(tmp_path, tensorboard=False)
    with pytest.raises(ReportError, match="reward/mask/mena"):
        writer.metrics(1, {"loss": 1.0, "reward/mask/mena": 0.5})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
    assert not (tmp_path / "logs").exists()


def test_a_continued_run_has_each_step_once(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "_FILES", itertools.count(9))  # names of one second are sorted as text
    for start, last in ((0, 5), (3, 6)):  # killed after step 5, its last checkpoint is of step 3
        writer = RunWriter(tmp_path, start)
        for step in range(start + 1, last + 1):
            writer.metrics(step, {"lr": float(last)})
            writer.rollouts([{"step": step, "role": "mask"}])
        writer.close()
    assert [(row["step"], row["lr"]) for row in lines(tmp_path / "metrics.jsonl")] == [
        (1, 5.0), (2, 5.0), (3, 5.0), (4, 6.0), (5, 6.0), (6, 6.0),
    ]  # fmt: skip
    assert [row["step"] for row in lines(tmp_path / "rollouts.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert scalars(tmp_path)["lr"] == [(1, 5.0), (2, 5.0), (3, 5.0), (4, 6.0), (5, 6.0), (6, 6.0)]


def test_a_run_killed_before_its_first_checkpoint_scores_step_0_once(tmp_path):
    for _ in range(2):
        writer = RunWriter(tmp_path, 0)
        writer.metrics(0, {"eval/fixed_masks/accuracy": 0.5})
        writer.close()
    assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == [0]


def test_a_place_that_cannot_be_written_is_a_disk_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="--run-dir"):
        RunWriter(tmp_path / "file" / "run")
    (tmp_path / "logs").write_text("")
    with pytest.raises(DiskError, match="--no-tensorboard"):
        RunWriter(tmp_path)


def test_wandb_is_asked_for_only_when_wanted(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # Python's own way to say: not installed
    RunWriter(tmp_path, tensorboard=False).close()
    with pytest.raises(
        ConfigError, match="wandb_project is 'zero' and wandb is not installed. Run `.* -m pip install wandb`"
    ):
        RunWriter(tmp_path, tensorboard=False, wandb_project="zero")


def test_wandb_gets_the_same_figures_and_a_continued_run_its_own_curves(tmp_path, monkeypatch):
    (tmp_path / "lib" / "wandb").mkdir(parents=True)
    (tmp_path / "lib" / "wandb" / "__init__.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    for step in (1, 2):
        writer = RunWriter(
            tmp_path / "run", step - 1, tensorboard=False, wandb_project="zero", wandb_config={"seed": 1}
        )
        writer.metrics(step, {"loss": 0.5})
        writer.close()
    monkeypatch.delitem(sys.modules, "wandb")
    calls = lines(tmp_path / "lib" / "wandb" / "calls.jsonl")
    assert [call[0] for call in calls] == ["init", "log", "finish"] * 2
    common = {"project": "zero", "name": "run", "config": {"seed": 1}, "resume": "allow"}
    assert calls[0][1] == common | {"id": None}
    assert calls[3][1] == common | {"id": "abc123"}
    assert calls[1][1:] == [{"loss": 0.5}, 1]


def test_writing_reports_loads_neither_torch_nor_wandb():
    code = (
        "import sys, megatron_pz.report.writers, megatron_pz.report.page, megatron_pz.report.console\n"
        "print({'torch', 'megatron', 'wandb', 'tensorflow'} & set(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert shown.stdout.strip() == "set()", shown.stderr
