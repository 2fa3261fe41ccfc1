"""Megatron's Transformer Engine layers beside its local ones: names, places in a checkpoint, packed rows, updates, FP8 rows.

In a process of its own, twice: with Transformer Engine replaced by plain torch (tests/stand_in), and with the real one where it is
installed (`make test-engine`), whose compiled functions alone are replaced. Those are tests/gpu's.
"""

import hf_models
import pytest
from engine_runs import report_of, skip_without_engine

OF_RECIPE = {
    "blockwise": ["e4m3", "blockwise", "Float8BlockScaling", 128],
    "tensorwise": ["hybrid", "tensorwise", "Float8CurrentScaling", 16],
    "delayed": ["hybrid", "delayed", "TEDelayedScaling", 16],
    "mxfp8": ["e4m3", "mxfp8", "MXFP8BlockScaling", 32],
}
"""Megatron's format and recipe, Transformer Engine's class, what the row is a multiple of."""


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    return report_of("te_worker.py", tmp_path_factory.mktemp("te"))


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    skip_without_engine()
    return report_of("te_worker.py", tmp_path_factory.mktemp("te"), "--real")


@pytest.fixture(scope="module", params=["stand_in", "real"])
def report(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("name", hf_models.MODELS)
def test_both_kinds_of_layers_answer_learn_and_are_named_alike(report, name):
    found = report[name]
    assert found["logits"] < 1e-4 and found["gradients"] < 1e-4
    assert found["bitwise"] == [] and found["keys"] == []


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe mixed"])
def test_a_checkpoint_of_either_fills_the_other(report, name):
    assert report[name]["crossed"] == []


@pytest.mark.parametrize("recipe", OF_RECIPE)
def test_a_recipe_reaches_the_products_and_rows_are_padded_for_it(stand_in, recipe):
    found, (form, name, cls, multiple) = stand_in["fp8"][recipe], OF_RECIPE[recipe]
    assert found["recipe"] == [form, name]
    assert {seen for seen, _ in found["seen"]} == {cls}
    assert found["row"] == multiple  # 10 tokens
    # The stand-in computes as before, so that padding must not show in the loss.
    assert found["loss"] == pytest.approx(stand_in["fp8"]["off"]["loss"], abs=5e-3)


def test_first_layers_in_bfloat16_have_no_fp8_products(stand_in):
    assert stand_in["fp8"]["off"]["products"] == 0
    # Of two layers the first is spared, and `delayed` cannot spare any.
    assert 0 < stand_in["fp8"]["blockwise"]["products"] < stand_in["fp8"]["delayed"]["products"]


def test_layers_at_either_end_stay_in_bfloat16(stand_in):
    # Of three dense layers, four products each, by how many of the first and of the last are spared.
    assert stand_in["products"] == {"0 0": 12, "1 0": 8, "0 1": 8, "1 1": 4}


def test_what_the_cuda_platform_fuses_ran(stand_in):
    permutation = {"moe_permute", "moe_permute_with_probs", "moe_unpermute", "moe_sort_chunks_by_index"}
    assert set(stand_in["fused"]) == {"apply_rotary_pos_emb", *permutation}


def test_a_micro_batch_waits_once_a_layer_of_experts_and_nowhere_else(report):
    # The tokens of each expert, by which Transformer Engine's grouped product is told its sizes; and once an update, at its end.
    at_the_end = {"_local_scalar_dense in megatron/distributed/finalize_model_grads.py:finalize_model_grads": 1}
    assert report["waits"]["qwen3"] == at_the_end
    sizes = "tolist in megatron/transformer/moe/experts.py:forward"
    assert report["waits"]["qwen3_moe"] == at_the_end | {sizes: 2}


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_updates_are_those_of_the_local_layers(report, kind):
    found = report["updates"][f"{kind} float32"]
    assert found["engine"] == pytest.approx(found["local"], abs=2e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_a_trainer_that_was_loaded_and_rested_goes_on_to_the_bit(report, kind, dtype):
    found = report["updates"][f"{kind} {dtype}"]
    assert found["loaded"] == found["engine"][2] and found["differ"] == []


def test_the_real_one_ran_its_own_layers_and_adam(real):
    wanted = {
        "generic_gemm",
        "rmsnorm_fwd",
        "fused_rope_forward",
        "fused_attn_fwd",
        "fused_attn_bwd",
        "te_general_grouped_gemm",
    }
    assert wanted | {"multi_tensor_adam", "convert_thd_to_bshd"} <= set(real["fused"])
    assert {found["optimizer"].split(".")[0] for found in real["updates"].values()} == {"transformer_engine"}
