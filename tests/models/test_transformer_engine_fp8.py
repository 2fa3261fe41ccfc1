"""Training in FP8 by the real Transformer Engine's Python, where it is installed (`make test-engine`), beside bfloat16.

Its quantisers, products and casts of masters are plain torch here (tests/fake_engine_fp8.py), and round as its recipes say. The
kernels are tests/gpu's.
"""

import pytest
from engine_runs import report_of, skip_without_engine

QUANTISER = {
    "blockwise": ("Float8BlockQuantizer", "Float8BlockwiseQTensor"),
    "tensorwise": ("Float8CurrentScalingQuantizer", "Float8Tensor"),
    "delayed": ("Float8Quantizer", "Float8Tensor"),
}
"""Transformer Engine's class of what is multiplied, and of weights that are kept so."""
CASES = [
    (kind, recipe, keeps)
    for kind in ("qwen3", "qwen3_moe")
    for recipe in QUANTISER
    for keeps in (False, True)
    if (kind, recipe, keeps) != ("qwen3_moe", "delayed", True)  # refused
]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    skip_without_engine()
    return report_of("engine_fp8_worker.py", tmp_path_factory.mktemp("fp8"), "--real")


@pytest.mark.parametrize(("kind", "recipe", "keeps"), CASES)
def test_updates_in_fp8_are_close_to_those_in_bfloat16(report, kind, recipe, keeps):
    found, (quantiser, weight) = report[f"{kind} {recipe} {keeps}"], QUANTISER[recipe]
    assert found["seen"] == [quantiser]
    assert found["kept"] == ([weight, "Tensor"] if keeps else ["Tensor"])
    first, second, third = found["losses"]
    assert [first, second] == pytest.approx(report[f"{kind} off"]["losses"][:2], abs=0.03)  # 0.02 is seen
    assert third < second - 0.03  # of how experts are chosen a rounding makes more in time


@pytest.mark.parametrize(("kind", "recipe", "keeps"), CASES)
def test_a_trainer_in_fp8_that_was_loaded_and_rested_goes_on(report, kind, recipe, keeps):
    found = report[f"{kind} {recipe} {keeps}"]
    assert found["loaded"] == found["losses"][2]
    if (recipe, keeps) != (
        "delayed",
        True,
    ):  # its scales are taken from the weights as they were loaded, which are rounded
        assert found["differ"] == []
