"""Work of a forward, counted by hand."""

import pytest

from megatron_pz.models.flops import forward_flops

QWEN3 = {
    "model_type": "qwen3",
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 100,
    "rope_theta": 1e4,
}


def test_a_dense_model_by_hand():
    # A layer: query and output 8 x 16 each, key and value 8 x 8 each, MLP 3 x 8 x 16; the head 8 x 100.
    weights = 2 * (2 * 128 + 2 * 64 + 384) + 800
    # A pair: 2 layers, 16 wide, 4 operations, half of all pairs.
    assert forward_flops(QWEN3) == (2 * weights, 2 * 16 * 4 / 2)


def test_of_experts_the_chosen_ones_count():
    sparse = QWEN3 | {
        "model_type": "qwen3_moe",
        "num_experts": 32,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 5,
        "mlp_only_layers": [0],
    }
    weights = 2 * (2 * 128 + 2 * 64) + 384 + (3 * 3 * 8 * 5 + 8 * 32) + 800
    assert forward_flops(sparse)[0] == 2 * weights


def test_qwen3_30b_a3b_has_three_billion_active_parameters():
    shape = QWEN3 | {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 48,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "vocab_size": 151936,
    }
    # 3.35e9 by its authors' count, less the embedding of 0.31e9, which is looked up.
    assert forward_flops(shape)[0] / 2 == pytest.approx(3.04e9, rel=0.01)
