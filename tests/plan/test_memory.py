"""Planned bytes are those that a real run allocates: torchrun and gloo on the CPU, an update made, all tensors counted.

Also what autograd keeps at the fullest moment of an update, against the formula. Errors are relative.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

LAYOUTS = Path(__file__).parents[1] / "layouts"
sys.path.insert(0, str(LAYOUTS))

from allocated import held  # noqa: E402  (it chooses the CPU)
from allocation_cases import ALONE, OF_FOUR, OF_TWO, config_of  # noqa: E402
from programs import on_ranks  # noqa: E402

from megatron_pz.plan.activations import Row, layer_bytes  # noqa: E402
from megatron_pz.plan.assumptions import Assumptions  # noqa: E402
from megatron_pz.plan.layouts import Machines, Planner  # noqa: E402
from megatron_pz.plan.memory import stage_activations, state  # noqa: E402
from megatron_pz.plan.stages import build_stages  # noqa: E402
from megatron_pz.train.parallel import shutdown  # noqa: E402

TOLERANCE = 0.01
"""Largest error of parameters, gradients, optimizer state, their sum, and of what autograd keeps."""


def planned(case, world_size):
    config = config_of(case)
    found = {}
    for stage in build_stages(case["model"], config, world_size):
        names = ("parameters", "gradients", "optimizer")
        found[stage.index] = dict(zip(names, state(stage, config), strict=True))
    return found


def planned_kept(case, ranks):
    """Bytes that autograd keeps on a rank of each stage."""
    config, lengths = config_of(case), np.array(ranks[0]["lengths"])
    row = Row(
        int(lengths.sum()) // config.parallel.context_parallel_size,
        int(lengths.max()),
        float((lengths**2).sum() / lengths.sum()),
    )
    planner = Planner(case["model"], config, Machines(len(ranks), 1, is_engine=False, assumed=Assumptions()))
    transformer = planner.transformer(config)
    layers = [
        layer_bytes(transformer, at, is_moe=flag, is_engine=False, mean_length=row.mean)
        for at, flag in enumerate(planner.family.is_moe_layer(case["model"]))
    ]
    return {
        stage.index: stage_activations(stage, config, transformer, layers, row, ranks[0]["micro_batches"])
        for stage in build_stages(case["model"], config, len(ranks))
    }


def agree(case, ranks):
    """Each rank with its stage; the plan is for the rank that has most of what is shared out."""
    for index, parts in planned(case, len(ranks)).items():
        of_stage = [rank for rank in ranks if rank["stage"] == index]
        for name, value in parts.items():
            fullest = max(rank[name] for rank in of_stage)
            print(f"{name}: planned {value}, allocated {fullest}, error {value / fullest - 1:+.4f}")
            assert value == pytest.approx(fullest, rel=TOLERANCE), name
        total = max(rank["all"] for rank in of_stage)
        print(f"all tensors: planned {sum(parts.values())}, allocated {total}, {sum(parts.values()) / total - 1:+.4f}")
        assert sum(parts.values()) == pytest.approx(total, rel=TOLERANCE)


def agree_on_kept(case, ranks):
    """Over all ranks of a stage, for experts on one get what those on others do not."""
    for index, wanted in planned_kept(case, ranks).items():
        found = [rank["kept"] for rank in ranks if rank["stage"] == index]
        measured = sum(found) / len(found)
        print(f"kept: planned {wanted}, measured {measured:.0f}, error {wanted / measured - 1:+.4f}")
        assert wanted == pytest.approx(measured, rel=TOLERANCE)


def run(which, num_ranks, folder):
    report = folder / f"{which}.json"
    on_ranks(num_ranks, LAYOUTS / "allocation_worker.py", which, report, timeout_s=280)
    return json.loads(report.read_text())


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run("OF_TWO", 2, tmp_path_factory.mktemp("allocated"))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return run("OF_FOUR", 4, tmp_path_factory.mktemp("allocated"))


# What was recomputed last may still be there.
@pytest.mark.parametrize("name", [name for name, case in OF_TWO.items() if not case["transformer"]])
def test_planned_state_of_two_ranks_is_allocated(two, name):
    agree(OF_TWO[name], two[name])


@pytest.mark.parametrize("name", OF_TWO)
def test_planned_activations_of_two_ranks_are_kept(two, name):
    agree_on_kept(OF_TWO[name], two[name])


@pytest.mark.parametrize("name", ALONE)
def test_planned_bytes_of_one_rank_are_allocated_and_kept(name):
    try:
        ranks = [held(ALONE[name]["model"], config_of(ALONE[name]))]
    finally:
        shutdown()
    agree_on_kept(ALONE[name], ranks)
    if not ALONE[name]["transformer"]:  # what was recomputed last may still be there
        agree(ALONE[name], ranks)


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_FOUR)
def test_planned_state_of_four_ranks_is_allocated(four, name):
    agree(OF_FOUR[name], four[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_FOUR)
def test_planned_activations_of_four_ranks_are_kept(four, name):
    agree_on_kept(OF_FOUR[name], four[name])
