"""The main job under torchrun: what it plays and learns is what one process plays and learns, and it goes on from its checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from demo_runs import ROOT, arguments, rows, write_text
from transformers import AutoModelForCausalLM

LAYOUTS = {
    "one process": (1, {}),
    "dp2": (2, {}),
    "tp2 sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "cp2": (2, {"context_parallel_size": 2}),
}
GROUPS = {"paragraphs_per_step": 4, "n_masks_per_paragraph": 6, "n_predictions_per_mask": 6}
TOLERANCE = 1e-4  # relative, of loss and gradient norm in float32 after up to two updates


def launch(ranks: int, run_dir: Path, corpus: Path, **flags: object) -> subprocess.CompletedProcess[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*torchrun, "-m", "megatron_pz", *arguments(run_dir, corpus, **flags)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run directories after three steps, which two ranks make in two starts."""
    folder = tmp_path_factory.mktemp("layouts")
    corpus = write_text(folder / "text.jsonl")
    for name, (ranks, layout) in LAYOUTS.items():
        for steps in (2, 3) if name == "dp2" else (3,):
            flags = {"train_iters": steps, "eval_interval": 1, "export_hf": steps == 3, **GROUPS, **layout}
            done = launch(ranks, folder / name, corpus, **flags)
            assert done.returncode == 0, done.stderr[-4000:]
    return {name: folder / name for name in LAYOUTS}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one process"])
def test_a_layout_plays_and_learns_what_one_process_does(runs: dict[str, Path], name: str) -> None:
    one, here = (
        [json.loads(line) for line in (runs[run] / "rollouts.jsonl").read_text().splitlines()]
        for run in ("one process", name)
    )
    played = ("step", "role", "prompt", "response", "reward")
    assert [[row[key] for key in played] for row in here] == [[row[key] for key in played] for row in one]
    for wanted, found in zip(rows(runs["one process"]), rows(runs[name]), strict=True):
        assert found["step"] == wanted["step"]
        for key in ("loss", "grad_norm", "reward/prediction/mean", "eval/fixed_masks/accuracy", "tokens/trained"):
            assert (key in found) == (key in wanted)
            if key in wanted:
                assert found[key] == pytest.approx(wanted[key], rel=TOLERANCE, abs=1e-6), (key, found["step"])
    assert sum("grad_norm" in row for row in rows(runs[name])) >= 2, "the run hardly learned"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", LAYOUTS)
def test_its_export_is_the_policy_of_one_process(runs: dict[str, Path], name: str) -> None:
    one = AutoModelForCausalLM.from_pretrained(runs["one process"] / "hf").state_dict()
    here = AutoModelForCausalLM.from_pretrained(runs[name] / "hf").state_dict()
    assert here.keys() == one.keys()
    assert (
        max(float((here[key] - one[key]).abs().max()) for key in one) < 1e-3
    )  # Adam turns rounding of small gradients into steps


@pytest.mark.timeout(600)
def test_text_is_learned_in_interleaved_stages_as_in_one_process(tmp_path: Path) -> None:
    corpus = write_text(tmp_path / "text.jsonl")
    interleaved = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    for name, ranks, layout in (("one", 1, {}), ("interleaved", 2, interleaved)):
        flags = {"task": "sft", "prompt_weight": 1.0, "max_tokens_per_micro_batch": 256, "export_hf": True}
        done = launch(ranks, tmp_path / name, corpus, train_iters=3, **flags, **layout)
        assert done.returncode == 0, done.stderr[-4000:]
    one, here = (rows(tmp_path / name) for name in ("one", "interleaved"))
    assert [row["step"] for row in here] == [row["step"] for row in one] == [1, 2, 3]
    for wanted, found in zip(one, here, strict=True):
        for key in ("loss", "grad_norm", "tokens/trained", "entropy"):
            assert found[key] == pytest.approx(wanted[key], rel=TOLERANCE), (key, found["step"])
    wanted, found = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "hf").state_dict() for name in ("one", "interleaved")
    )
    assert found.keys() == wanted.keys()
    assert max(float((found[key] - value).abs().max()) for key, value in wanted.items()) < 1e-3


def test_a_layout_that_does_not_divide_is_refused_once(tmp_path: Path) -> None:
    corpus = write_text(tmp_path / "text.jsonl")
    done = launch(2, tmp_path / "run", corpus, train_iters=1, tensor_model_parallel_size=4)
    assert done.returncode != 0
    assert done.stderr.count("LayoutError: ") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.timeout(600)
def test_by_entropy_several_ranks_ask_what_one_process_asks(tmp_path: Path) -> None:
    corpus, asked = write_text(tmp_path / "text.jsonl"), []
    for name, ranks, layout in (("one", 1, {}), ("dp2 cp2", 4, {"context_parallel_size": 2})):
        done = launch(ranks, tmp_path / name, corpus, train_iters=1, task="entropy_ntp", **layout)
        assert done.returncode == 0, done.stderr[-4000:]
        lines = (tmp_path / name / "rollouts.jsonl").read_text().splitlines()
        asked.append([(row["mask_id"], row["prompt"], row["response"]) for row in map(json.loads, lines)])
    assert asked[0] == asked[1] and len(asked[0]) == 2 * 4 * 4
