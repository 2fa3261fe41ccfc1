"""A server of another model is refused before weights are sent (engine/sglang/served.py)."""

import json

import pytest

from megatron_pz.engine.sglang.served import check_served
from megatron_pz.errors import EngineError

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
