"""`--load`: a run that begins from a checkpoint's weights, converted or another run's."""

import pytest
from demo_runs import ROOT, rows, run, write_text

from megatron_pz.platform.select import select_platform

select_platform("cpu")  # before Megatron is imported

from megatron_pz.checkpoint import convert  # noqa: E402

TIMES = ("time/", "memory/")


@pytest.fixture
def corpus(tmp_path):
    return write_text(tmp_path / "text.jsonl")


def numbers(folder):
    return [{key: value for key, value in row.items() if not key.startswith(TIMES)} for row in rows(folder)]


def test_a_run_begins_from_a_conversion_as_from_the_folder_and_from_another_run_s_step(tmp_path, corpus, capsys):
    convert.to_megatron(ROOT / "examples" / "demo_policy", tmp_path / "converted")
    assert run(tmp_path / "a", corpus, task="continue_pt", train_iters=2, save_interval=1, keep=2) == 0
    given = {"task": "continue_pt", "train_iters": 2, "load": tmp_path / "converted"}
    assert run(tmp_path / "b", corpus, **given, init="random") == 0
    assert f"weights of {tmp_path / 'converted'}; the optimizer begins anew" in capsys.readouterr().out
    assert numbers(tmp_path / "b") == numbers(tmp_path / "a")

    # The weights are those after the first step, the optimizer and the text begin anew.
    given["load"] = tmp_path / "a" / "checkpoints" / "step_000001"
    assert run(tmp_path / "c", corpus, **given) == 0
    assert numbers(tmp_path / "c")[0]["loss"] < numbers(tmp_path / "a")[0]["loss"]


def test_a_load_that_is_no_checkpoint_is_refused(tmp_path, corpus, capsys):
    assert run(tmp_path / "run", corpus, task="continue_pt", train_iters=1, load=tmp_path / "nowhere") == 2
    assert "nowhere has no readable manifest.json" in capsys.readouterr().err
