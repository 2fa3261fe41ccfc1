"""A server of another model is refused before weights are sent (engine/sglang/served.py)."""

import json

import pytest

from megatron_pz.config.fp8 import QUANTIZATION_CONFIG
from megatron_pz.engine.sglang.served import check_blocks, check_precision, check_served
from megatron_pz.errors import ConfigError, EngineError

CONFIG = {"model_type": "qwen3", "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 4}


def test_the_same_model_passes(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"dtype": "bfloat16"}))
    check_served("u", {"model_path": str(tmp_path), "model_type": "qwen3"}, CONFIG)
    check_served("u", {"model_path": "Qwen/some-name", "model_type": "qwen3"}, CONFIG)


def test_every_shape_that_differs_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 100, "hidden_size": 32}))
    with pytest.raises(EngineError, match=r"vocab_size is 100 there and 512 here; hidden_size is 32 there and 64 here"):
        check_served("u", {"model_path": str(tmp_path), "model_type": "qwen3"}, CONFIG)


def test_another_family_is_known_without_the_folder():
    with pytest.raises(EngineError, match=r"model_type is llama there and qwen3 here.*--server-urls"):
        check_served("u", {"model_path": "far/away", "model_type": "llama"}, CONFIG)


@pytest.mark.parametrize("field", [{"mlp_only_layers": [0]}, {"tie_word_embeddings": True}])
def test_a_moe_that_sglang_reads_wrongly_is_refused(field):
    config = CONFIG | {"model_type": "qwen3_moe"}
    check_served("u", {"model_path": "x", "model_type": "qwen3_moe"}, config)
    with pytest.raises(EngineError, match="would answer nonsense"):
        check_served("u", {"model_path": "x", "model_type": "qwen3_moe"}, config | field)


FP8 = json.dumps({"quantization_config": QUANTIZATION_CONFIG})


def test_a_server_must_have_room_for_the_weights_that_it_will_be_handed(tmp_path):
    info = {"model_path": str(tmp_path)}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    check_precision("u", info, {}, "trained")
    check_precision("u", info, {"json_model_override_args": FP8}, "fp8_blockwise")
    with pytest.raises(EngineError, match="quantization_config None.*'fp8_blockwise'.*convert_checkpoint"):
        check_precision("u", info, {"json_model_override_args": "{}"}, "fp8_blockwise")
    with pytest.raises(EngineError, match="'trained'"):
        check_precision("u", info, {"json_model_override_args": FP8}, "trained")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | json.loads(FP8)))
    check_precision("u", info, {}, "fp8_blockwise")
    with pytest.raises(EngineError, match="'trained'"):
        check_precision("u", info, {}, "trained")
    check_precision("u", {"model_path": "far/away"}, {}, "fp8_blockwise")  # nothing is known of it


def test_blocks_must_end_where_the_parts_of_fused_weights_do():
    shape = {
        "hidden_size": 100,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 9728,
    }
    check_blocks(shape, 1)
    check_blocks(shape, 4)
    check_blocks(shape | {"moe_intermediate_size": 768, "intermediate_size": 1}, 2)
    with pytest.raises(ConfigError, match=r"intermediate_size is 1216 over 8 GPUs, no multiple of 128"):
        check_blocks(shape, 8)
    with pytest.raises(ConfigError, match=r"queries .* is 576 over 1 GPUs"):  # SmolLM2-135M
        check_blocks(
            {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536}, 1
        )
