"""From config.json and the settings of a run to Megatron's TransformerConfig, and what is refused on the way."""

from dataclasses import replace
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version

from megatron_pz.platform.select import select_platform

PLATFORM = select_platform("cpu")

from megatron_pz.config.schema import Config, ModelConfig, ParallelConfig  # noqa: E402
from megatron_pz.errors import ConfigError, LayoutError, ModelError  # noqa: E402
from megatron_pz.models.folder import read_hf_config, resolve_folder  # noqa: E402
from megatron_pz.models.registry import family  # noqa: E402
from megatron_pz.models.rope import RopeScaling, read_rope, scaled  # noqa: E402
from megatron_pz.models.transformer import padded_vocab_size, transformer_config  # noqa: E402

HF = {
    "model_type": "qwen3",
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
}
MOE = HF | {
    "model_type": "qwen3_moe",
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "decoder_sparse_step": 2,
}


def settings(hf: dict, config: Config | None = None):
    return transformer_config(family(hf), hf, config or Config(), PLATFORM)


def test_sizes_of_config_json_are_those_of_megatron():
    found = settings(HF)
    assert (found.num_layers, found.hidden_size, found.ffn_hidden_size) == (4, 64, 96)
    assert (found.num_attention_heads, found.num_query_groups, found.kv_channels) == (4, 2, 32)
    assert (found.layernorm_epsilon, found.qk_layernorm, found.add_bias_linear) == (1e-5, True, False)
    assert found.calculate_per_token_loss


def test_llama_takes_its_head_size_and_groups_from_the_heads():
    hf = {key: value for key, value in HF.items() if key not in ("head_dim", "num_key_value_heads")}
    found = settings(hf | {"model_type": "llama"})
    assert (found.kv_channels, found.num_query_groups, found.qk_layernorm) == (16, 4, False)


def test_every_second_layer_has_experts_where_the_sparse_step_is_two():
    found = settings(MOE)
    assert found.moe_layer_freq == [0, 1, 0, 1]
    assert (found.num_moe_experts, found.moe_router_topk, found.moe_ffn_hidden_size) == (6, 2, 48)
    assert found.moe_router_pre_softmax  # norm_topk_prob is off by default
    assert not settings(MOE | {"norm_topk_prob": True}).moe_router_pre_softmax


def test_smollm3_leaves_positions_out_of_every_fourth_layer():
    assert settings(HF | {"model_type": "smollm3"}).no_rope_freq == [0, 0, 0, 1]
    assert settings(HF | {"model_type": "smollm3", "no_rope_layers": [0, 1, 1, 1]}).no_rope_freq == [1, 0, 0, 0]


def test_an_unknown_family_is_told_with_the_nearest_known():
    with pytest.raises(ModelError, match=r"'qwen2_moe'.*nearest: qwen3_moe"):
        family({"model_type": "qwen2_moe"})


@pytest.mark.parametrize(
    "change", [{"attention_bias": True}, {"mlp_bias": True}, {"use_sliding_window": True}, {"hidden_act": "gelu"}]
)
def test_what_a_table_has_no_place_for_is_refused_by_name(change):
    with pytest.raises(ModelError, match=next(iter(change))):
        settings(HF | change)


def test_a_missing_field_is_named():
    with pytest.raises(ModelError, match="no 'num_hidden_layers'"):
        settings({key: value for key, value in HF.items() if key != "num_hidden_layers"})


def test_the_transformer_table_sets_megatrons_own_fields():
    found = settings(HF, Config(transformer={"recompute_granularity": "selective", "init_method_std": 0.5}))
    assert (found.recompute_granularity, found.init_method_std) == ("selective", 0.5)


def test_an_unknown_name_in_the_transformer_table_is_told_with_the_nearest():
    with pytest.raises(ConfigError, match="transformer.recompute_granuality .*recompute_granularity"):
        settings(HF, Config(transformer={"recompute_granuality": "selective"}))


def test_a_size_of_the_layout_in_the_transformer_table_is_sent_to_its_section():
    with pytest.raises(ConfigError, match=r"set by \[parallel\]"):
        settings(HF, Config(transformer={"tensor_model_parallel_size": 2}))


def test_what_megatron_refuses_is_an_error_of_the_settings():
    with pytest.raises(ConfigError, match="Megatron-Core refuses"):
        settings(HF, Config(transformer={"recompute_granularity": "everything"}))


@pytest.mark.parametrize(
    ("hf", "layout", "told"),
    [
        (HF, {"tensor_model_parallel_size": 3}, "2 query groups"),
        (HF, {"tensor_model_parallel_size": 64}, "num_attention_heads = 4"),
        (HF, {"pipeline_model_parallel_size": 3}, "num_layers = 4"),
        (HF, {"expert_model_parallel_size": 2}, "a dense model"),
        (MOE, {"expert_model_parallel_size": 4}, "6 experts"),
    ],
)
def test_a_layout_that_does_not_divide_the_model_is_refused(hf, layout, told):
    with pytest.raises(LayoutError, match=told):
        settings(hf, Config(parallel=ParallelConfig(**layout)))


def test_transformer_engine_layers_are_refused_on_the_cpu():
    with pytest.raises(ConfigError, match="on the platform cpu it must be"):
        settings(HF, Config(transformer={"transformer_impl": "transformer_engine"}))


def test_bfloat16_sets_weights_stages_and_a_float32_router():
    found = settings(MOE, Config(model=ModelConfig(params_dtype="bfloat16")))
    assert (found.params_dtype, found.pipeline_dtype, found.bf16) == (torch.bfloat16, torch.bfloat16, True)
    assert found.moe_router_dtype == "fp32"


def test_later_stages_learn_the_length_of_each_micro_batch():
    assert settings(HF, Config(parallel=ParallelConfig(pipeline_model_parallel_size=2))).variable_seq_lengths
    assert not settings(HF).variable_seq_lengths


def test_the_z_loss_is_scaled_where_megatron_forgets_the_shards():
    config = Config(transformer={"moe_z_loss_coeff": 1e-3})
    assert settings(MOE, config).moe_z_loss_coeff == 1e-3
    split = ParallelConfig(context_parallel_size=2, tensor_model_parallel_size=2, sequence_parallel=True)
    is_mended = Version(version("megatron-core")) >= Version("0.19")
    assert settings(MOE, replace(config, parallel=split)).moe_z_loss_coeff == pytest.approx(1e-3 if is_mended else 4e-3)


def test_the_auxiliary_loss_is_scaled_where_megatron_forgets_the_sequence_shards():
    # Guarded by an equality of gradients in tests/train/test_layouts.py; megatron-core 0.16.1.
    config = Config(transformer={"moe_aux_loss_coeff": 0.01}, parallel=ParallelConfig(tensor_model_parallel_size=2))
    assert settings(MOE, config).moe_aux_loss_coeff == 0.01
    assert settings(MOE, config).moe_router_load_balancing_type == "aux_loss"
    sharded = replace(config, parallel=replace(config.parallel, sequence_parallel=True))
    is_mended = Version(version("megatron-core")) >= Version("0.19")
    assert settings(MOE, sharded).moe_aux_loss_coeff == pytest.approx(0.01 if is_mended else 0.02)


def test_the_vocabulary_is_padded_to_a_multiple_of_divisor_times_ranks():
    assert [padded_vocab_size(131, 8, size) for size in (1, 2, 4)] == [136, 144, 160]
    assert padded_vocab_size(128, 8, 2) == 128


def test_rotary_settings_are_read_in_both_spellings():
    assert read_rope({"rope_theta": 5e5}) == (5e5, None)
    assert read_rope({"rope_parameters": {"rope_theta": 2e6, "rope_type": "default"}}) == (2e6, None)
    assert read_rope({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4}}) == (
        1e4,
        RopeScaling("linear", 4.0),
    )
    with pytest.raises(ModelError, match="'yarn'.*default, linear and llama3"):
        read_rope({"rope_scaling": {"rope_type": "yarn", "factor": 4}})


def test_llama3_scaling_keeps_fast_angles_divides_slow_ones_and_goes_between():
    # Turns over the original context of 6.283...: 10, 2.5 and 0.5, against bounds 1 and 4.
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 1)
    fast, middle, slow = scaled(2 * torch.pi * torch.tensor([10.0, 2.5, 0.5]), scaling) / (2 * torch.pi)
    assert fast == pytest.approx(10.0)
    assert middle == pytest.approx(0.5 * 2.5 + 0.5 * 2.5 / 8)
    assert slow == pytest.approx(0.5 / 8)


def test_a_folder_that_is_not_there_is_an_error_with_a_way_out(tmp_path):
    with pytest.raises(ModelError, match="does not exist; give a folder"):
        resolve_folder(tmp_path / "nothing")
    with pytest.raises(ModelError, match="has a config.json"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="is not JSON"):
        read_hf_config(tmp_path)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"num_layers": "two"}, r"transformer\.num_layers is 'two', a str; it must be a int"),
        ({"layernorm_epsilon": True}, r"transformer\.layernorm_epsilon is True, a bool; it must be a float"),
        ({"moe_grouped_gemm": 1}, r"transformer\.moe_grouped_gemm is 1, a int; it must be a bool"),
    ],
)
def test_a_value_of_another_type_is_named_before_megatron_sees_it(table, message):
    with pytest.raises(ConfigError, match=message):
        settings(HF, Config(transformer=table))


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch):
    def refuse(name, **_):
        raise OSError("no way out\n\nMany words about the hub.")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ModelError) as caught:
        resolve_folder("Qwen/Qwen3-4B-Base")
    assert str(caught.value).endswith(
        "could not be fetched (OSError: no way out); give the path of a downloaded folder."
    )
