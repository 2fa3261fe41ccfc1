"""The real Transformer Engine's layers under layouts of two ranks, where it is installed (`make test-engine`).

Errors are relative to local layers in one process, in float32; what it compiles is plain torch, and gloo stands for NCCL.
"""

import json

import pytest
from engine_runs import TESTS, skip_without_engine
from programs import on_ranks

CASES = ["dp2", "tp2", "tp2 sp", "pp2", "untied pp2", "vpp2, one bin"]
CASES += ["moe tp2 sp", "moe pp2", "moe ep2", "moe tp2 sp ep2", "moe tp2 sp ep2, replayed"]
OF_CONTEXT = ["cp2", "nope cp2", "moe cp2 ep2, replayed"]
UPDATED = ["dp2, updated, overlapped", "moe ep2, updated"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    skip_without_engine()
    out = tmp_path_factory.mktemp("layouts") / "report.json"
    on_ranks(2, TESTS / "layouts/engine_layout_worker.py", out, "--real", timeout_s=280)
    found = json.loads(out.read_text())
    assert set(found) == {*CASES, *OF_CONTEXT, *UPDATED}
    return found


@pytest.mark.parametrize("case", CASES)
def test_gradients_metrics_and_scores_are_those_of_local_layers_in_one_process(report, case):
    found = report[case]
    assert max(found["grad"], found["worst"], found["metrics"], found["score"]) <= 1e-5, found


@pytest.mark.parametrize("case", OF_CONTEXT)
def test_log_probs_under_context_parallelism_are_those_of_whole_sequences(report, case):
    assert report[case]["score"] <= 0.05  # nats, in bfloat16: 0.024 is seen


@pytest.mark.parametrize("case", UPDATED)
def test_an_update_by_its_adam_changes_the_weights_as_torch_s_does(report, case):
    # Adam divides by the gradient's own size, which lifts the noise of tiny gradients.
    found = report[case]
    assert found["weights"] <= 1e-5 and found["grad"] <= 2e-4 and found["worst"] <= 1e-3, found
    assert found["largest"] <= 0.05 * 1e-3, found  # a twentieth of the learning rate
