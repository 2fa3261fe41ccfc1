"""What tools/inspect_checkpoint.py says of whole, damaged, converted and foreign folders, and its exit status."""

import json
import shutil

import programs
import pytest
from demo_runs import ROOT, run, tiny_policy, write_text

from megatron_pz.platform.select import select_platform

select_platform("cpu")  # before Megatron is imported

from megatron_pz.checkpoint import convert  # noqa: E402

FILE = "shards/__0_0.distcp"


@pytest.fixture(scope="module")
def tool():
    return programs.tool("inspect_checkpoint")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    policy, corpus = tiny_policy(folder / "policy"), write_text(folder / "text.jsonl")
    given = {"hf_model": policy, "init": "random", "task": "continue_pt", "train_iters": 2}
    assert run(folder / "run", corpus, **given) == 0
    return folder / "run"


@pytest.fixture
def checkpoint(run_dir, tmp_path):
    return shutil.copytree(run_dir / "checkpoints" / "step_000002", tmp_path / "step_000002")


def said(tool, capsys, *arguments):
    status = tool.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_checkpoint_of_a_run_is_described(tool, checkpoint, capsys):
    status, out, _ = said(tool, capsys, checkpoint)
    assert status == 0
    found = {line[:12].strip(): line[12:] for line in out.split("\n\n")[0].splitlines()}
    assert found["step"] == "2" and found["model"].startswith("qwen3 ")
    assert found["optimizer"] == "yes, after 2 updates"
    assert found["written by"].startswith("1 ranks: tensor model 1, pipeline model 1, ")
    config = json.loads((ROOT / "examples" / "demo_policy" / "config.json").read_text())
    vocabulary, hidden = -(-config["vocab_size"] // 8) * 8, 32
    assert "embedding.word_embeddings.weight" in out and f"float32  {vocabulary}x{hidden} " in out
    assert "optimizer.state.exp_avg_sq.embedding.word_embeddings.weight" in out
    assert "optimizer.state.param" not in out  # in float32 the masters are the weights
    assert "every file is there (not verified)" in out


def test_verification_names_every_damaged_missing_and_extra_file(tool, checkpoint, capsys):
    status, out, err = said(tool, capsys, checkpoint, "--verify", "--no-tensors")
    assert status == 0 and "verified: every file is as it was written" in out and "damaged" not in err
    data = bytearray((checkpoint / FILE).read_bytes())
    data[len(data) // 2] ^= 1
    (checkpoint / FILE).write_bytes(data)
    (checkpoint / "run_state.json").unlink()
    (checkpoint / "shards" / "notes.txt").write_text("mine")
    status, out, err = said(tool, capsys, checkpoint, "--verify", "--no-tensors")
    assert status == 1 and "verified" not in out
    assert f"damaged: {FILE} was altered after it was written" in err
    assert "damaged: run_state.json is missing" in err
    assert "extra: shards/notes.txt is not in the manifest" in out


def test_without_verification_what_can_be_seen_is_told(tool, checkpoint, capsys):
    index = checkpoint / "shards" / ".metadata"
    index.write_bytes(index.read_bytes()[:-400])
    status, _, err = said(tool, capsys, checkpoint)
    assert status == 1 and ".metadata cannot be read" in err
    (checkpoint / FILE).unlink()
    status, _, err = said(tool, capsys, checkpoint)
    assert status == 1 and f"damaged: {FILE} is missing" in err


def test_a_converted_checkpoint_has_weights_alone_and_json_tells_the_same(tool, tmp_path, capsys):
    convert.to_megatron(ROOT / "examples" / "demo_policy", tmp_path / "converted")
    status, out, _ = said(tool, capsys, tmp_path / "converted", "--verify")
    assert status == 0 and "none: weights only, for --load" in out
    status, out, _ = said(tool, capsys, tmp_path / "converted", "--json")
    told = json.loads(out)
    assert status == 0 and told["damage"] == [] and told["extra"] == [] and not told["verified"]
    assert not any(tensor["is_optimizer"] for tensor in told["tensors"])


def test_foreign_folders_are_refused_with_the_way_out(tool, run_dir, tmp_path, capsys):
    assert said(tool, capsys, tmp_path / "nowhere")[0] == 2
    status, _, err = said(tool, capsys, run_dir)
    assert status == 2 and f"Did you mean {run_dir / 'checkpoints' / 'step_000002'}?" in err
    (tmp_path / "manifest.json").write_text('{"format": "other"}')
    status, _, err = said(tool, capsys, tmp_path)
    assert status == 2 and "format is 'other'" in err
