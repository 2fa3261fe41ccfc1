"""Which layouts fit, and what is proposed (plan/layouts.py, memory.py, traffic.py, step_time.py), on hand-worked cases."""

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_pz.platform.select import select_platform

select_platform("cpu")

from megatron_pz.config.load import read_config  # noqa: E402  (the platform comes first)
from megatron_pz.errors import ConfigError, LayoutError  # noqa: E402
from megatron_pz.plan.assumptions import GIB, Assumptions  # noqa: E402
from megatron_pz.plan.layouts import Machines, Planner, check_tables, distance  # noqa: E402
from megatron_pz.plan.memory import optimizer_width  # noqa: E402
from megatron_pz.plan.stages import Buffer  # noqa: E402
from megatron_pz.plan.traffic import Group  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples"
WIDE = Buffer(False, 100, 128, 64, 2, parameter_bytes=4, gradient_bytes=4)
HALF = dataclasses.replace(WIDE, parameter_bytes=2)


def planner(name, world_size, **changes):
    config = read_config(EXAMPLES / f"{name}.toml")
    assumed = dataclasses.replace(Assumptions(), **changes.pop("assumed", {}))
    if changes:
        config = dataclasses.replace(
            config, **{k: dataclasses.replace(getattr(config, k), **v) for k, v in changes.items()}
        )
    hf = json.loads((EXAMPLES / "models" / Path(config.model.hf_model).name / "config.json").read_text())
    return Planner(hf, config, Machines(world_size, 1, is_engine=True, assumed=assumed)), config


def test_the_optimizer_keeps_two_moments_and_a_master_of_what_is_narrower():
    assert optimizer_width(WIDE, {}) == 8
    assert optimizer_width(HALF, {}) == 12


def test_a_precision_aware_optimizer_is_as_narrow_as_it_is_told():
    table = {"use_precision_aware_optimizer": True, "exp_avg_dtype": "bfloat16", "exp_avg_sq_dtype": "bfloat16"}
    assert optimizer_width(HALF, table) == 2 + 2 + 2  # of the master only what the parameter lacks
    assert optimizer_width(HALF, table | {"store_param_remainders": False}) == 4 + 2 + 2


def test_a_group_is_on_as_many_nodes_as_its_ranks():
    assert Group(8, 1).num_nodes(8) == 1
    assert Group(4, 4).num_nodes(8) == 2
    assert Group(8, 8).num_nodes(8) == 8


def test_what_does_not_fit_says_so_and_the_nearest_that_does_comes_first():
    own, config = planner("pretrain_zero_30b_1node", 8, parallel={"expert_model_parallel_size": 1})
    plan = own.plan(config)
    assert any(fault.startswith("stage 0 needs") for fault in plan.faults)
    found = own.propose()
    assert found and not any(plan.faults for plan in found)
    distances = [distance(config, plan.config) for plan in found]
    assert distances == sorted(distances)
    assert distances[0] > 0
    # 12 bytes of optimizer state for each of 30.5 billion parameters are shared by all 8 ranks, whatever the layout.
    for plan in found:
        assert plan.gib * GIB > 30.5e9 * 12 / 8


def test_what_cannot_be_shared_out_has_neighbours_that_can():
    own, config = planner("pretrain_zero_30b_1node", 8, parallel={"tensor_model_parallel_size": 3})
    with pytest.raises(LayoutError, match="tensor_model_parallel_size is 3"):
        own.plan(config)
    assert own.propose()[0].config.parallel.tensor_model_parallel_size in (2, 4)


def test_odd_numbers_of_ranks_are_shared_out_too():
    own, _ = planner("pretrain_zero_qwen3_4b", 12, parallel={"pipeline_model_parallel_size": 5})
    stages = {plan.config.parallel.pipeline_model_parallel_size for plan in own.propose()}
    assert {3, 6} <= stages  # 36 layers, 12 ranks
    assert 8 not in stages


def test_more_tokens_and_less_recomputation_take_more_memory():
    own, config = planner("pretrain_zero_qwen3_8b", 8)
    plan = own.plan(config)
    more = dataclasses.replace(config, train=dataclasses.replace(config.train, max_tokens_per_micro_batch=32768))
    # The table of rotary angles does not grow.
    assert own.plan(more).memories[0].activations == pytest.approx(2 * plan.memories[0].activations, rel=0.01)
    nothing_again = dataclasses.replace(config, transformer={})
    assert own.plan(nothing_again).memories[0].activations > 5 * plan.memories[0].activations
    # A layer's input, 4096 numbers of 2 bytes, for each of 36 layers and 16384 tokens.
    assert plan.memories[0].activations > 36 * 16384 * 4096 * 2


def test_a_reference_policy_takes_the_weights_once_more():
    own, config = planner("pretrain_zero_qwen3_4b", 8)
    with_reference = dataclasses.replace(config, train=dataclasses.replace(config.train, kl_coef=0.1))
    one, other = own.plan(config), own.plan(with_reference)
    assert other.memories[0].reference == pytest.approx(one.memories[0].parameters, rel=1e-3)
    assert other.memories[0].total - one.memories[0].total == other.memories[0].reference
    assert other.server.cache < one.server.cache


def test_a_pipeline_holds_most_at_its_beginning():
    own, config = planner("pretrain_zero_qwen3_8b", 8, parallel={"pipeline_model_parallel_size": 4})
    activations = [memory.activations for memory in own.plan(config).memories]
    assert activations[0] > activations[1] > activations[2]


def test_names_that_megatron_does_not_know_are_refused():
    with pytest.raises(ConfigError, match="no field of Megatron-Core's OptimizerConfig; did you mean"):
        _, config = planner("pretrain_zero_qwen3_4b", 8)
        check_tables(dataclasses.replace(config, optimizer={"exp_avg_dtyp": "bfloat16"}))


def test_a_server_too_large_for_its_gpu_is_named():
    own, config = planner("pretrain_zero_30b_1node", 8, assumed={"gpu_memory_gib": 40.0})
    assert any("a server's cache has" in fault for fault in own.plan(config).faults)


def test_the_cache_takes_two_rows_a_layer_and_token():
    own, config = planner("pretrain_zero_qwen3_4b", 8)
    server = own.plan(config).server
    assert server.token == 2 * 36 * 8 * 128 * 2  # keys and values, layers, heads, their size, bytes
    assert server.weights == pytest.approx(4.022e9 * 2, rel=1e-3)


def test_data_parallel_traffic_is_gradients_and_parameters_once():
    own, config = planner("pretrain_zero_qwen3_4b", 8)
    data, weights = own.plan(config).wires
    assert (data.name, data.num_ranks, data.num_nodes) == ("data", 8, 1)
    assert weights.num_bytes == pytest.approx(4.022e9 * 2, rel=1e-3)  # gathered, and read in place by colocated servers
    assert data.num_bytes == pytest.approx(4.022e9 * (4 + 2) * 7 / 8, rel=1e-3)


def test_twice_the_ranks_take_half_the_time_to_compute():
    own, config = planner("pretrain_zero_30b_1node", 8)
    twice, _ = planner("pretrain_zero_30b_1node", 16)
    one, other = own.plan(config).time, twice.plan(config).time
    assert other.compute == pytest.approx(one.compute / 2)
    # 3.0 billion active parameters without the embedding, 2304 rollouts of 1500 tokens of which 0.7 are trained, 8 operations a
    # parameter and token (recomputed) and attention's: between 1 and 1.6 times that for the tokens that are not spread evenly.
    floor = 8 * 3.0e9 * 2304 * 0.7 * 1500 / (8 * 989e12 * 0.45)
    assert floor < one.compute < 1.6 * floor


def test_a_checkpoint_holds_weights_moments_and_masters_and_its_copy_is_told():
    own, config = planner("pretrain_zero_30b_1node", 8)
    plan = own.plan(config)
    total = plan.saves.checkpoint_bytes / 14  # bfloat16, two moments and a master
    assert 30.4e9 < total < 30.7e9
    assert plan.saves.num_on_disk == config.checkpoint.keep + 1 and plan.saves.host_bytes == 0
    own, config = planner("pretrain_zero_30b_1node", 8, checkpoint={"async_save": True})
    copied = own.plan(config).saves.host_bytes
    assert copied >= plan.saves.checkpoint_bytes  # one node writes all of it
    own, config = planner(
        "pretrain_zero_30b_1node", 8, checkpoint={"async_save": True}, assumed={"host_memory_gib": plan.host_gib + 1}
    )
    assert any("--no-async-save" in fault for fault in own.plan(config).faults)
