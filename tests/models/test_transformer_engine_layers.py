"""Megatron's Transformer Engine layers beside its local ones: names, places in a checkpoint, packed rows, FP8 rows.

Transformer Engine itself is replaced by plain torch (tests/stand_in), in a process of its own; its kernels are tests/gpu's.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import hf_models
import pytest

TESTS = Path(__file__).parents[1]
OF_RECIPE = {
    "blockwise": ["e4m3", "blockwise", "Float8BlockScaling", 128],
    "tensorwise": ["hybrid", "tensorwise", "Float8CurrentScaling", 16],
    "delayed": ["hybrid", "delayed", "TEDelayedScaling", 16],
    "mxfp8": ["e4m3", "mxfp8", "MXFP8BlockScaling", 32],
}
"""Megatron's format and recipe, Transformer Engine's class, what the row is a multiple of."""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("te")
    # Megatron's fused activation and dropout run uncompiled: what they compute is Megatron's.
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, str(TESTS / "layouts/te_worker.py"), str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("name", hf_models.MODELS)
def test_both_kinds_of_layers_answer_learn_and_are_named_alike(report, name):
    found = report[name]
    assert found["logits"] < 1e-4 and found["gradients"] < 1e-4
    assert found["bitwise"] == [] and found["keys"] == []


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe mixed"])
def test_a_checkpoint_of_either_fills_the_other(report, name):
    assert report[name]["crossed"] == []


@pytest.mark.parametrize("recipe", OF_RECIPE)
def test_a_recipe_reaches_the_products_and_rows_are_padded_for_it(report, recipe):
    found, (form, name, cls, multiple) = report["fp8"][recipe], OF_RECIPE[recipe]
    assert found["recipe"] == [form, name]
    assert {seen for seen, _ in found["seen"]} == {cls}
    assert found["row"] == multiple  # 10 tokens
    # The stand-in computes as before, so that padding must not show in the loss.
    assert found["loss"] == pytest.approx(report["fp8"]["off"]["loss"], abs=5e-3)


def test_first_layers_in_bfloat16_have_no_fp8_products(report):
    assert report["fp8"]["off"]["products"] == 0
    # Of two layers the first is spared, and `delayed` cannot spare any.
    assert 0 < report["fp8"]["blockwise"]["products"] < report["fp8"]["delayed"]["products"]


def test_layers_at_either_end_stay_in_bfloat16(report):
    # Of three dense layers, four products each, by how many of the first and of the last are spared.
    assert report["products"] == {"0 0": 12, "1 0": 8, "0 1": 8, "1 1": 4}


def test_what_the_cuda_platform_fuses_ran(report):
    permutation = {"moe_permute", "moe_permute_with_probs", "moe_unpermute", "moe_sort_chunks_by_index"}
    assert set(report["fused"]) == {"apply_rotary_pos_emb", *permutation}


def test_a_micro_batch_waits_once_a_layer_of_experts_and_nowhere_else(report):
    # The tokens of each expert, by which Transformer Engine's grouped product is told its sizes; and once an update, at its end.
    at_the_end = {"_local_scalar_dense in megatron/distributed/finalize_model_grads.py:finalize_model_grads": 1}
    assert report["waits"]["qwen3"] == at_the_end
    sizes = "tolist in megatron/transformer/moe/experts.py:forward"
    assert report["waits"]["qwen3_moe"] == at_the_end | {sizes: 2}
