"""The name table: each mapping undoes itself, for every number of ranks, and both spellings of norms are found."""

import pytest
import torch

from megatron_pz.models.family import EXPERTS, MLP
from megatron_pz.models.names import Direct, Experts, FusedQKV, GatedMLP, TensorShape, Vocabulary, find_entry
from megatron_pz.models.registry import FAMILIES

SHAPE = TensorShape(num_query_groups=4, kv_channels=2, vocab_size=11, padded_vocab_size=16)
H = 3
Q, K, V = torch.arange(48.0).view(16, H), 100 + torch.arange(24.0).view(8, H), 200 + torch.arange(24.0).view(8, H)
FUSED = FusedQKV("q", "k", "v")

CASES = {
    "replicated": (Direct("a"), [torch.arange(5.0)]),
    "rows": (Direct("a", 0), [torch.arange(24.0).view(8, H)]),
    "columns": (Direct("a", 1), [torch.arange(24.0).view(H, 8)]),
    "vocabulary": (Vocabulary("a"), [torch.arange(33.0).view(11, H)]),
    "qkv": (FUSED, [Q, K, V]),
    "gated": (GatedMLP("g", "u"), [torch.arange(24.0).view(8, H), 50 + torch.arange(24.0).view(8, H)]),
    "experts": (Experts(GatedMLP("g", "u")), [torch.arange(24.0).view(8, H), 50 + torch.arange(24.0).view(8, H)]),
}


@pytest.mark.parametrize("size", [1, 2, 4, 8])  # 8: two ranks share a query group
@pytest.mark.parametrize("case", CASES)
def test_shards_of_any_number_of_ranks_give_the_tensors_back(case, size):
    mapping, tensors = CASES[case]
    shards = [mapping.to_shard(tensors, SHAPE, rank, size) for rank in range(size)]
    again = mapping.to_hf(shards, SHAPE)
    assert len(again) == len(tensors) == len(mapping.hf_names)
    assert all(torch.equal(left, right) for left, right in zip(again, tensors, strict=True))
    assert len({shard.shape for shard in shards}) == 1


def test_fused_rows_are_a_groups_queries_then_its_key_then_its_value():
    # 4 groups of 2 query heads with 2 channels: group 1 is rows 4..7 of Q and rows 2..3 of K and V.
    fused = FUSED.to_shard([Q, K, V], SHAPE, 0, 1)
    assert torch.equal(fused[8:16], torch.cat([Q[4:8], K[2:4], V[2:4]]))


def test_each_rank_holds_its_rows_of_the_gate_and_then_of_the_up():
    gate, up = torch.arange(4.0)[:, None], 10 + torch.arange(4.0)[:, None]
    assert GatedMLP("g", "u").to_shard([gate, up], SHAPE, 1, 2).flatten().tolist() == [2, 3, 12, 13]


def test_padding_of_the_vocabulary_is_zeros_on_the_last_ranks():
    table = torch.ones(11, 1)
    assert Vocabulary("a").to_shard([table], SHAPE, 1, 2).flatten().tolist() == [1, 1, 1, 0, 0, 0, 0, 0]


HF = {
    "qwen3": {"num_hidden_layers": 2, "tie_word_embeddings": True},
    "qwen3_moe": {"num_hidden_layers": 2, "num_experts": 2, "mlp_only_layers": [0]},
    "smollm3": {"num_hidden_layers": 2},
    "llama": {"num_hidden_layers": 2},
}
SIZES = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "moe_intermediate_size": 8,
    "num_experts_per_tok": 1,
    "num_attention_heads": 2,
    "vocab_size": 11,
}


@pytest.mark.parametrize(
    ("name", "layer", "expert", "first"),
    [
        ("decoder.layers.1.input_layernorm.weight", 1, None, "model.layers.1.input_layernorm.weight"),
        ("decoder.layers.1.self_attention.linear_qkv.layer_norm_weight", 1, None, "model.layers.1.input_layernorm.weight"),
        ("decoder.layers.0.mlp.linear_fc1.layer_norm_weight", 0, None, "model.layers.0.post_attention_layernorm.weight"),
        ("decoder.layers.0.pre_mlp_layernorm.weight", 0, None, "model.layers.0.post_attention_layernorm.weight"),
        ("decoder.layers.12.mlp.experts.local_experts.3.linear_fc2.weight", 12, 3, "model.layers.12.mlp.experts.3.down_proj.weight"),
        ("decoder.layers.12.mlp.experts.linear_fc1.weight31", 12, 31, "model.layers.12.mlp.experts.31.gate_proj.weight"),
    ],
)  # fmt: skip
def test_local_and_transformer_engine_spellings_find_the_same_line(name, layer, expert, first):
    found = find_entry(FAMILIES["qwen3_moe"].names(HF["qwen3_moe"]), name)
    assert found is not None
    entry, *place = found
    assert place == [layer, expert]
    assert entry.hf_names(layer, expert)[0] == first


def test_an_unknown_parameter_finds_no_line():
    assert (
        find_entry(FAMILIES["llama"].names(HF["llama"]), "decoder.layers.0.self_attention.q_layernorm.weight") is None
    )


@pytest.mark.parametrize("model_type", FAMILIES)
def test_no_megatron_name_stands_for_two_lines(model_type):
    names = [spelling for entry in FAMILIES[model_type].names(HF[model_type]) for spelling in entry.megatron]
    assert len(names) == len(set(names))


def test_a_whole_model_is_named_layer_by_layer_dense_or_with_experts():
    hf = SIZES | HF["qwen3_moe"]
    names = FAMILIES["qwen3_moe"].hf_names(hf)
    per_layer = 2 + 4 + 2  # norms, projections, norms of queries and keys
    assert len(names) == len(set(names)) == 3 + 2 * per_layer + 3 + (1 + 2 * 3)
    assert "model.layers.0.mlp.up_proj.weight" in names
    assert "model.layers.1.mlp.experts.1.up_proj.weight" in names
    assert "model.layers.0.mlp.gate.weight" not in names
    assert "lm_head.weight" in names
    assert "lm_head.weight" not in FAMILIES["qwen3"].hf_names(SIZES | HF["qwen3"])  # tied
    assert {entry.scope for entry in MLP} == {"dense"} and {entry.scope for entry in EXPERTS} == {"moe"}
