"""Every layout, packing and budget gives the gradients of one process (float32, gloo, real torchrun).

Two runs of `tests/layouts/gradient_worker.py`, with all cases of 2 and of 4 ranks. Errors are relative, over all
parameters (`grad`) and of the worst one (`worst`); both stay under 1e-6 here and 1e-5 is asked for.
"""

import json
from pathlib import Path

import pytest
from programs import on_ranks

WORKER = Path(__file__).parents[1] / "layouts" / "gradient_worker.py"
TOLERANCE = 1e-5

ALONE = ["one bin each", "one bin for all", "sequence mean, one bin each", "moe, one bin each"]
OF_TWO = [
    *("dp2", "dp2, sequence mean", "dp2, one bin for all, overlapped", "dp2, old and reference scored"),
    "dp2, importance masked",
    *("cp2", "cp2, one bin each, old and reference scored", "nope cp2", "moe cp2 ep2, replayed"),
    *("moe cp2, auxiliary loss", "vpp3", "vpp2, one bin", "moe vpp2, replayed and recomputed"),
    *("tp2", "tp2 sp", "pp2", "pp2, old and reference scored", "untied pp2"),
    *("moe dp2", "moe tp2 sp", "moe pp2", "moe ep2", "moe ep2, one bin each", "moe tp2 sp ep2"),
    *("moe dp2, replayed", "moe tp2 sp ep2, replayed", "moe pp2, replayed and recomputed"),
    *("moe tp2 sp, auxiliary loss", "moe tp2 sp ep2, auxiliary loss"),
    *("moe tp2 sp, z loss", "moe cp2, z loss"),
]
OF_FOUR = [
    *("tp2 pp2", "tp2 sp pp2", "tp2 dp2", "moe tp2 sp pp2 ep2"),
    *("cp4", "pp4 vpp2", "tp2 sp cp2", "cp2 vpp2, old and reference scored", "moe tp2 sp etp2 ep2"),
]
UPDATED = ["dp2, updated", "dp2, updated, overlapped", "moe ep2, updated"]
UPDATED_OF_FOUR = ["moe dp4 ep2, updated", "vpp2 dp2, updated, overlapped", "cp2 dp2, updated"]


def _run(which: str, num_ranks: int, folder: Path) -> dict:
    report = folder / f"{which}.json"
    on_ranks(num_ranks, WORKER, which, report, timeout_s=280)
    found = json.loads(report.read_text())
    for name, errors in found.items():
        print(f"{name}: {errors}")
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return _run("two", 2, tmp_path_factory.mktemp("layouts"))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return _run("four", 4, tmp_path_factory.mktemp("layouts"))


def _agrees(errors: dict) -> None:
    assert errors["grad"] <= TOLERANCE, errors
    assert errors["worst"] <= TOLERANCE, errors
    assert errors["metrics"] <= TOLERANCE, errors
    assert errors["score"] <= 1e-5, errors  # nats


@pytest.mark.parametrize("case", [*ALONE, *OF_TWO])
def test_gradients_metrics_and_scores_are_those_of_one_process(two, case):
    _agrees(two[case])


@pytest.mark.parametrize("case", OF_FOUR)
def test_gradients_of_four_ranks_are_those_of_one_process(four, case):
    _agrees(four[case])


def _changes_alike(errors: dict) -> None:
    # Adam divides by the gradient's own size, which lifts the noise of tiny gradients.
    assert errors["weights"] <= TOLERANCE, errors
    assert errors["grad"] <= 5 * TOLERANCE, errors
    assert errors["worst"] <= 20 * TOLERANCE, errors
    assert errors["largest"] <= 0.01 * 1e-3, errors  # a hundredth of the learning rate


@pytest.mark.parametrize("case", UPDATED)
def test_one_update_of_the_distributed_optimizer_changes_the_weights_as_one_process_does(two, case):
    _changes_alike(two[case])


@pytest.mark.parametrize("case", UPDATED_OF_FOUR)
def test_one_update_over_four_ranks_changes_the_weights_as_one_process_does(four, case):
    _changes_alike(four[case])


def test_vocabulary_parallel_log_probs_are_exact_also_where_a_rank_has_padding_only(two):
    assert set(two["vocabulary parallel"]) == {"vocab 16", "vocab 11", "vocab 8", "vocab 5"}
    assert max(two["vocabulary parallel"].values()) < 1e-12  # float64


def test_a_nan_on_one_rank_stops_both_with_the_same_words_and_nothing_changed(two):
    (said, is_kept, updates_counted), other = two["refusal"]["heard"]
    assert [said, is_kept, updates_counted] == other
    assert "loss is nan" in said
    assert "loss is not finite: 1." in said
    assert is_kept
    assert updates_counted == 0


def test_no_case_of_the_worker_goes_unread(two, four):
    assert set(two) == {*ALONE, *OF_TWO, *UPDATED, "vocabulary parallel", "refusal"}
    assert set(four) == {*OF_FOUR, *UPDATED_OF_FOUR}
