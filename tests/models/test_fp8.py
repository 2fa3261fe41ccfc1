"""Which models, machines and settings `model.fp8` is for, and parameters that are kept in FP8."""

from dataclasses import replace

import pytest
import torch

from megatron_pz.platform.select import select_platform

PLATFORM = select_platform("cpu")

from megatron_pz.config.rules import validate  # noqa: E402
from megatron_pz.config.schema import (  # noqa: E402
    CheckpointConfig,
    Config,
    CorpusConfig,
    EngineConfig,
    ModelConfig,
    ParallelConfig,
)
from megatron_pz.errors import ConfigError  # noqa: E402
from megatron_pz.models import quantized  # noqa: E402
from megatron_pz.models.transformer import RECIPES, fp8_fields, token_multiple  # noqa: E402
from megatron_pz.platform.cpu import CpuPlatform  # noqa: E402

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "kv_channels": 16, "ffn_hidden_size": 128}


class Card(CpuPlatform):
    """A machine that answers as one with a GPU of this compute capability."""

    def __init__(self, capability):
        self.capability = capability

    def fp8_fault(self, recipe, capability):
        return None if self.capability >= capability else f"compute capability is {self.capability}"


def config(fp8="blockwise", **model):
    return Config(
        model=ModelConfig(**{"hf_model": "m", "params_dtype": "bfloat16", "fp8": fp8, **model}),
        corpus=CorpusConfig(data_path="d"),
        engine=EngineConfig(engine="sglang"),
        checkpoint=CheckpointConfig(run_dir="r"),
    )


@pytest.mark.parametrize(
    ("recipe", "oldest", "fields"),
    [
        ("blockwise", (9, 0), {"fp8": "e4m3", "fp8_recipe": "blockwise", "fp8_param": False}),
        ("tensorwise", (8, 9), {"fp8": "hybrid", "fp8_recipe": "tensorwise", "fp8_param": False}),
        ("delayed", (8, 9), {"fp8": "hybrid", "fp8_recipe": "delayed", "fp8_param": False}),
        ("mxfp8", (10, 0), {"fp8": "e4m3", "fp8_recipe": "mxfp8", "fp8_param": False}),
    ],
)
def test_a_recipe_is_refused_below_its_compute_capability(recipe, oldest, fields):
    assert fp8_fields(config(recipe), SIZES, Card(oldest), "transformer_engine") == fields
    older = (8, 6) if oldest == (8, 9) else (8, 9)
    with pytest.raises(ConfigError, match=f"model.fp8 is '{recipe}'.*compute capability"):
        fp8_fields(config(recipe), SIZES, Card(older), "transformer_engine")


def test_fp8_is_refused_on_a_cpu_and_with_local_layers():
    with pytest.raises(ConfigError, match="platform is cpu"):
        fp8_fields(config(), SIZES, PLATFORM, "transformer_engine")
    with pytest.raises(ConfigError, match="layers are 'local'"):
        fp8_fields(config(), SIZES, Card((9, 0)), "local")


def test_a_rank_s_share_of_a_matrix_must_be_whole_blocks():
    halves = replace(config(), parallel=ParallelConfig(tensor_model_parallel_size=2))
    assert fp8_fields(halves, SIZES, Card((9, 0)), "transformer_engine")
    with pytest.raises(ConfigError, match="ffn_hidden_size / tensor = 12 must be a multiple of 16"):
        fp8_fields(halves, SIZES | {"ffn_hidden_size": 24}, Card((9, 0)), "transformer_engine")


def test_delayed_scales_of_experts_with_weights_in_fp8_are_refused():
    experts = SIZES | {"num_moe_experts": 8, "moe_ffn_hidden_size": 64}
    delayed = config("delayed", fp8_param_gather=True)
    assert fp8_fields(delayed, SIZES, Card((9, 0)), "transformer_engine")["fp8_param"]
    with pytest.raises(ConfigError, match="fp8_param_gather is true while .* checkpoints could not be loaded"):
        fp8_fields(delayed, experts, Card((9, 0)), "transformer_engine")


def test_tokens_of_a_rank_are_whole_blocks_and_equal_shares():
    shares = ParallelConfig(tensor_model_parallel_size=4, sequence_parallel=True)
    assert token_multiple(Config(parallel=shares)) == 4
    assert token_multiple(replace(config("mxfp8"), parallel=shares)) == 4 * 32
    assert {name: token_multiple(config(name)) for name in RECIPES} == {
        "blockwise": 128, "tensorwise": 16, "delayed": 16, "mxfp8": 32,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (config(params_dtype="float32"), "must be 'bfloat16'"),
        (config("off", fp8_param_gather=True), "needs a recipe"),
        (replace(config("delayed"), transformer={"first_last_layers_bf16": True}), "scales span all layers"),
        (replace(config(), engine=EngineConfig(engine="embedded")), "Use --engine sglang"),
        (replace(config(), transformer={"fp8": "e4m3"}), "model.fp8"),
        (replace(config(), ddp={"fp8_param_gather": True}), "model.fp8_param_gather"),
    ],
)
def test_settings_that_contradict_fp8_are_told(wrong, said):
    validate(config(), 1)
    with pytest.raises(ConfigError, match=said):
        validate(wrong, 1)


class Rounded(torch.Tensor):
    """A parameter of a class of its own, in whole numbers: as Transformer Engine's, it says `dequantize`."""

    def dequantize(self):
        return self.as_subclass(torch.Tensor).round()


def test_a_quantised_parameter_is_read_plain_and_filled_with_its_master():
    ordinary = torch.nn.Parameter(torch.tensor([1.4]))
    assert quantized.plain(ordinary).tolist() == pytest.approx([1.4])
    parameter, kept = torch.zeros(2).as_subclass(Rounded), torch.tensor([7.0, 7.0])
    parameter.get_high_precision_init_val = lambda: kept
    quantized.fill(parameter, torch.tensor([1.4, 2.6]))
    assert type(quantized.plain(parameter)) is torch.Tensor and quantized.plain(parameter).tolist() == [1.0, 3.0]
    assert kept.tolist() == pytest.approx([1.4, 2.6])
