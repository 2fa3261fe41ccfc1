"""A loss that is not finite, from real causes: refused, kept, dumped, repeated by the tool, and gone on from."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import programs
import pytest
from demo_runs import ROOT, TEXT, arguments, checkpoints, rows, run, tiny_policy, write_text

from megatron_pz.platform.select import select_platform

select_platform("cpu")  # before Megatron is imported

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from megatron_pz.corpus.tokenizer import load_tokenizer  # noqa: E402
from megatron_pz.train.dump import read_dump, write_dump  # noqa: E402

TOOL = ROOT / "tools" / "replay_step.py"
ONE_TEXT = TEXT[2]
MID_STEP_SEED = 1  # draws ONE_TEXT as the last text of step 2


@pytest.fixture(scope="module")
def replay():
    """The tool's `main`."""
    return programs.tool("replay_step").main


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """Settings of a small policy that reads plain text."""
    folder = tiny_policy(tmp_path_factory.mktemp("healthy") / "policy")
    return {"task": "continue_pt", "hf_model": folder, "init": "random"}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory, healthy):
    """Settings with a folder in which the embedding of a token of one text only is not a number; and that token's id.

    Its head is a tensor of its own: a tied one would spoil the logits of every text.
    """
    place = tmp_path_factory.mktemp("damaged")
    config = healthy["hf_model"] / "config.json"
    folder = Path(shutil.copytree(healthy["hf_model"], place / "untied"))
    (folder / "config.json").write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": False}))
    made = place / "made"
    assert (
        run(made, write_text(place / "text.jsonl"), **{**healthy, "hf_model": folder}, train_iters=1, export_hf=True)
        == 0
    )
    weights = load_file(made / "hf" / "model.safetensors")
    tokenizer = load_tokenizer(folder)
    ids = {text: set(tokenizer.encode(text)) for text in TEXT}
    (token, *_) = sorted(ids[ONE_TEXT] - set().union(*(found for text, found in ids.items() if text != ONE_TEXT)))
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, made / "hf" / "model.safetensors", metadata={"format": "pt"})
    return {"task": "continue_pt", "hf_model": made / "hf"}, token


@pytest.fixture
def corpus(tmp_path):
    return write_text(tmp_path / "text.jsonl")


def refusal(capsys):
    """The message, one line."""
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("NumericsError: ")]
    assert len(said) == 1, said
    return said[0]


def saved_files(run_dir, step):
    """Size and digest of what a checkpoint holds, without Megatron's index, which has a time in it."""
    manifest = json.loads((run_dir / "checkpoints" / f"step_{step:06d}" / "manifest.json").read_text())
    return {name: facts for name, facts in manifest["files"].items() if not name.endswith(".metadata")}


def test_a_damaged_weight_stops_the_run_at_the_text_that_uses_it(tmp_path, corpus, damaged, replay, capsys):
    folder, token = tmp_path / "run", damaged[1]
    settings = {**damaged[0], "train_iters": 6}
    assert run(folder, corpus, **settings) == 2
    said = refusal(capsys)
    step = rows(folder)[-1]["step"]
    dump = folder / "dumps" / f"step_{step + 1:06d}-rank0.pt"
    assert step >= 1, "the seed drew the damaged text first: nothing was there to be kept"
    assert f"step {step + 1}: loss is nan" in said and f"tools/replay_step.py {dump}" in said and "--lr" in said
    assert all(row["loss"] > 0 for row in rows(folder))  # only steps that were done are on record

    # The tool repeats it from the dump alone, and names the one text of two.
    before = torch.load(dump, weights_only=True)["error"]
    assert replay([str(dump)]) == 0
    told = capsys.readouterr().out
    assert f"refused now:   {before}" in told and "reproduced, with the same numbers" in told
    assert f"word_embeddings.weight (32 of 128000, rows {token})" in told
    assert "in 1 of 2 sequences are not finite" in told
    [sequence] = [line for line in told.splitlines() if "  sequence " in line]
    assert "loss nan" in sequence
    assert "after the ids" in told and f" {ONE_TEXT[0]!r}" in told

    # What was learned before is kept, bit for bit as a run that ends there leaves it.
    assert checkpoints(folder) == [f"step_{step:06d}"]
    assert run(tmp_path / "short", corpus, **settings | {"train_iters": step}) == 0
    assert saved_files(folder, step) == saved_files(tmp_path / "short", step)

    # Started again as it is, it says the same; without the text, it goes on.
    capsys.readouterr()
    assert run(folder, corpus, **settings) == 2
    assert refusal(capsys) == said
    write_text(corpus, tuple(text for text in TEXT if text != ONE_TEXT))
    assert run(folder, corpus, **settings) == 0
    assert [row["step"] for row in rows(folder)] == [1, 2, 3, 4, 5, 6]


def test_a_dump_whose_cause_is_mended_is_not_reproduced(tmp_path, corpus, damaged, replay, capsys):
    settings, token = damaged
    assert run(tmp_path / "run", corpus, **settings, train_iters=6) == 2
    dump = read_dump(next((tmp_path / "run" / "dumps").glob("*.pt")))
    assert token in dump.plan.micro_batches[0][0].token_ids
    mended = [{name: values.nan_to_num(0.0) for name, values in chunk.items()} for chunk in dump.weights]
    path = write_dump(replace(dump, weights=mended), tmp_path / "mended")
    capsys.readouterr()
    assert replay([str(path)]) == 1
    assert "NOT reproduced: the update is finite" in capsys.readouterr().out


def test_a_run_that_diverges_can_go_back_behind_the_damage(tmp_path, corpus, healthy, replay, capsys):
    folder = tmp_path / "run"
    settings = {**healthy, "keep": 1}
    assert run(folder, corpus, **settings, train_iters=2) == 0
    assert run(folder, corpus, **settings, train_iters=20, lr=1e30) == 2
    refused = int(re.match(r"NumericsError: step (\d+): ", refusal(capsys))[1])
    assert refused > 3  # the first update at this rate is still of finite numbers
    # The state before the refused update is saved; the sound one stays beside it although keep is 1.
    assert checkpoints(folder) == ["step_000002", f"step_{refused - 1:06d}"]
    assert replay([str(folder / "dumps" / f"step_{refused:06d}-rank0.pt")]) == 0
    assert re.search(r"weights: (not finite in|the largest is .*e\+3\d, in)", capsys.readouterr().out)
    (folder / "checkpoints" / f"step_{refused - 1:06d}").rename(folder / "checkpoints" / "diverged")
    assert run(folder, corpus, **settings, train_iters=4) == 0
    assert [row["step"] for row in rows(folder)] == [1, 2, 3, 4]
    assert all(row["loss"] < 20 for row in rows(folder))


def test_a_refusal_in_the_middle_of_a_step_saves_no_half_step(tmp_path, corpus, damaged, replay, capsys):
    folder = tmp_path / "run"
    settings = {**damaged[0], "updates_per_batch": 2, "seed": MID_STEP_SEED}
    assert run(folder, corpus, **settings, train_iters=6) == 2
    assert "NumericsError: step 2, update 2 of 2: " in refusal(capsys)  # the other text of step 2 has been learned
    assert checkpoints(folder) == []
    assert replay([str(folder / "dumps" / "step_000002-rank0.pt")]) == 0


def test_weights_that_cannot_be_sampled_from_are_told_by_the_engine(tmp_path, corpus, damaged, capsys):
    assert run(tmp_path / "run", corpus, **damaged[0] | {"task": "pretrain_zero"}, train_iters=4) == 2
    assert "EngineError: The model's logits are not finite" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, b"", b"not a dump", b"PK\x03\x04cut off"])
def test_what_is_no_dump_is_told(tmp_path, replay, capsys, content):
    path = tmp_path / "step_000001-rank0.pt"
    if content is not None:
        path.write_bytes(content)
    assert replay([str(path)]) == 2
    assert str(path) in capsys.readouterr().err
    assert replay([]) == 2


@pytest.mark.slow  # six processes that import torch: half a minute of CPU
def test_two_ranks_dump_and_repeat_together(tmp_path, corpus, damaged, replay, capsys):
    folder = tmp_path / "run"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    torchrun = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    settings = {**damaged[0], "train_iters": 6}
    job = [*torchrun, "-m", "megatron_pz", *arguments(folder, corpus, **settings)]
    ended = subprocess.run(job, cwd=ROOT, env=env, capture_output=True, text=True, timeout=170, check=False)
    assert ended.returncode != 0 and "NumericsError: step" in ended.stderr, ended.stderr[:6000]
    dumps = sorted((folder / "dumps").iterdir())
    assert [path.name[-8:] for path in dumps] == ["rank0.pt", "rank1.pt"]
    assert replay([str(dumps[0])]) == 2  # one process cannot
    assert "is of a run of 2 processes, found 1" in capsys.readouterr().err
    # Named by the other rank's file.
    again = subprocess.run(
        [*torchrun, str(TOOL), str(dumps[1])],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert again.returncode == 0, again.stdout + again.stderr[:6000]  # torchrun has the last word
    assert "reproduced, with the same numbers" in again.stdout
    assert again.stdout.count("in 1 of 1 sequences are not finite") == 1  # the other rank had the other text
