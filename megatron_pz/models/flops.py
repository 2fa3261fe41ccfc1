"""Work of a model's forward, as a function of a sequence's length."""

from __future__ import annotations

from megatron_pz.models.family import HfConfig
from megatron_pz.models.registry import family


def forward_flops(hf: HfConfig) -> tuple[float, float]:
    """FLOPs a token, and FLOPs a pair of tokens: a sequence of n tokens takes `first * n + second * n * n`.

    Two for each weight that a token is multiplied with (the head's included, of experts the chosen ones), and for each
    pair two in the product of query and key and two in that with the value, of which causal attention needs half.
    A backward takes twice as much of both.
    """
    fields, model = family(hf).transformer_fields(hf), family(hf).model_fields(hf)
    hidden, num_layers = fields["hidden_size"], fields["num_layers"]
    query = fields["num_attention_heads"] * fields["kv_channels"]
    key = fields["num_query_groups"] * fields["kv_channels"]
    experts = fields.get("num_moe_experts") or 0
    weights = num_layers * hidden * (2 * query + 2 * key) + hidden * model.vocab_size
    for is_moe in family(hf).is_moe_layer(hf):
        if is_moe:
            weights += hidden * (3 * fields["moe_ffn_hidden_size"] * fields["moe_router_topk"] + experts)
        else:
            weights += hidden * 3 * fields["ffn_hidden_size"]
    return 2.0 * weights, 2.0 * num_layers * query
