"""Names of optimizer state in a checkpoint of ours and in one that Megatron wrote (checkpoint/optimizer_state.py)."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_pz.errors import CheckpointError
from megatron_pz.platform.select import select_platform

select_platform("cpu")  # before Megatron is imported

from megatron_pz.checkpoint.optimizer_state import MASTER, _Names, saved_step  # noqa: E402


def names(*keys):
    return _Names(SimpleNamespace(tensor_keys=lambda: set(keys), folder=Path("step_000001/shards")))


def test_state_is_found_whatever_optimizer_of_megatron_s_held_it():
    found = names(
        "layers.weight",
        "experts.weight",
        "optimizer.state.exp_avg.layers.weight",
        "chained_0.optimizer.state.exp_avg_sq.layers.weight",
        "chained_1.optimizer.state.exp_avg.experts.weight",
        "chained_1.optimizer.state.fp32_param.experts.weight",
    )
    assert found.of("exp_avg", "layers.weight") == "optimizer.state.exp_avg.layers.weight"
    assert found.of("exp_avg_sq", "layers.weight") == "chained_0.optimizer.state.exp_avg_sq.layers.weight"
    assert found.of("exp_avg", "experts.weight") == "chained_1.optimizer.state.exp_avg.experts.weight"
    assert found.of(MASTER, "experts.weight") == "chained_1.optimizer.state.fp32_param.experts.weight"
    assert found.of(MASTER, "layers.weight") == "layers.weight"  # where weights are in float32 they are the masters


def test_weights_without_an_optimizer_are_refused_with_the_way_out():
    with pytest.raises(CheckpointError, match="step_000001 has no exp_avg of layers.weight: .*--load"):
        names("layers.weight").of("exp_avg", "layers.weight")


def test_updates_are_counted_where_megatron_keeps_their_number():
    assert saved_step({"optimizer": {0: {"optimizer": {"param_groups": [{"lr": 1.0, "step": 3}]}}}}) == 3
    assert saved_step({"optimizer": {"state": {"common_step": 7.0}, "param_groups": [{"lr": 9.0}]}}) == 7
    assert saved_step({}) == 0
