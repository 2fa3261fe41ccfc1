"""Stages on the meta device (plan/stages.py), added up from parts (plan/parts.py), and their groups (plan/traffic.py)."""

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_pz.platform.select import select_platform

select_platform("cpu")

import torch.distributed as dist  # noqa: E402  (the platform comes first)
from megatron.core import parallel_state  # noqa: E402

from megatron_pz.config.schema import Config, ModelConfig, ParallelConfig  # noqa: E402
from megatron_pz.errors import LayoutError  # noqa: E402
from megatron_pz.plan.assumptions import Assumptions  # noqa: E402
from megatron_pz.plan.layouts import Machines, Planner  # noqa: E402
from megatron_pz.plan.parts import model_parts, stages_of  # noqa: E402
from megatron_pz.plan.stages import build_stages, fake_world, layers_of  # noqa: E402
from megatron_pz.plan.traffic import groups  # noqa: E402

MODELS = Path(__file__).parents[2] / "examples" / "models"
PUBLISHED = {  # parameters, as counted by others
    "SmolLM3-3B-Base": 3_075_098_624,
    "Qwen3-4B-Base": 4_022_468_096,
    "Qwen3-8B-Base": 8_190_735_360,
    "Qwen3-30B-A3B-Base": 30_532_122_624,
}


def read(name):
    return json.loads((MODELS / name / "config.json").read_text())


def layout(**sizes):
    sizes = {"sequence_parallel": sizes.get("tensor_model_parallel_size", 1) > 1} | sizes
    return Config(model=ModelConfig(hf_model="m", params_dtype="bfloat16"), parallel=ParallelConfig(**sizes))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_whole_model_has_as_many_parameters_as_is_published(name):
    assert model_parts(read(name), layout(), 1).total == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "world_size", "sizes"),
    [
        ("SmolLM3-3B-Base", 8, {}),
        ("Qwen3-4B-Base", 16, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 4}),
        ("Qwen3-8B-Base", 16, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 3}),
        ("Qwen3-8B-Base", 8, {"tensor_model_parallel_size": 8, "use_distributed_optimizer": False}),
        ("Qwen3-30B-A3B-Base", 64, {"expert_model_parallel_size": 16, "pipeline_model_parallel_size": 2}),
        (
            "Qwen3-30B-A3B-Base",
            64,
            {"expert_model_parallel_size": 16, "tensor_model_parallel_size": 4, "expert_tensor_parallel_size": 2},
        ),
    ],
)
def test_parts_add_up_to_the_stages_that_are_built(name, world_size, sizes):
    config, hf = layout(**sizes), read(name)
    built = build_stages(hf, config, world_size)
    added = stages_of(model_parts(hf, config, config.parallel.tensor_model_parallel_size), config, world_size)
    for one, other in zip(built, added, strict=True):
        plain = [dataclasses.replace(stage, buffers=()) for stage in (one, other)]
        assert plain[0] == plain[1]
        assert one.num_parameters == other.num_parameters
        for expert in (False, True):
            elements = [sum(b.num_elements for b in stage.buffers if b.is_expert is expert) for stage in (one, other)]
            shards = [sum(b.shard_parameters for b in stage.buffers if b.is_expert is expert) for stage in (one, other)]
            assert elements[1] == pytest.approx(elements[0], rel=1e-4)  # padding between parameters is not counted
            assert shards[1] == pytest.approx(shards[0], rel=1e-4)


def test_stages_share_out_the_layers():
    config = layout(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=3)
    assert layers_of(config, 12, 0) == (0, 1, 4, 5, 8, 9)
    assert layers_of(config, 12, 1) == (2, 3, 6, 7, 10, 11)


def test_a_layout_that_does_not_divide_the_ranks_is_refused():
    with pytest.raises(LayoutError, match="12 ranks.*= 8"):
        build_stages(read("Qwen3-4B-Base"), layout(tensor_model_parallel_size=8), 12)
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("world_size", "sizes"),
    [
        (64, {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 2, "expert_model_parallel_size": 8}),
        (64, {"context_parallel_size": 2, "tensor_model_parallel_size": 2, "expert_model_parallel_size": 16}),
        (32, {"tensor_model_parallel_size": 4, "expert_model_parallel_size": 4, "expert_tensor_parallel_size": 2}),
    ],
)
def test_groups_are_megatrons(world_size, sizes):
    config = layout(**sizes)
    machines = Machines(world_size, 1, is_engine=True, assumed=Assumptions())
    transformer = Planner(read("Qwen3-30B-A3B-Base"), config, machines).transformer(config)
    found = groups(config, transformer, world_size)
    with fake_world(config, world_size, 0):
        theirs = {
            "tensor": parallel_state.get_tensor_model_parallel_group(),
            "context": parallel_state.get_context_parallel_group(),
            "data": parallel_state.get_data_parallel_group(with_context_parallel=True),
            "pipeline": parallel_state.get_pipeline_model_parallel_group(),
            "expert tensor": parallel_state.get_expert_tensor_parallel_group(),
            "expert": parallel_state.get_expert_model_parallel_group(),
            "expert data": parallel_state.get_expert_data_parallel_group(),
        }
        ranks = {name: dist.get_process_group_ranks(group) for name, group in theirs.items()}
    assert {name: [place * g.stride for place in range(g.size)] for name, g in found.items()} == ranks
