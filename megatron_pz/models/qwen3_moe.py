"""Qwen3 with experts: softmax router over routed experts, no shared expert, dense layers where config.json says so."""

from __future__ import annotations

from typing import Any

from megatron_pz.models import qwen3
from megatron_pz.models.family import EXPERTS, Family, HfConfig, require
from megatron_pz.models.names import Entry


def transformer_fields(hf: HfConfig) -> dict[str, Any]:
    """`TransformerConfig` fields of a Qwen3-MoE config.json."""
    num_layers = require(hf, "num_hidden_layers")
    sparse_step, dense_layers = hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers") or []
    return {
        **qwen3.transformer_fields(hf),
        "num_moe_experts": require(hf, "num_experts", "num_local_experts"),
        "moe_ffn_hidden_size": require(hf, "moe_intermediate_size"),
        "moe_layer_freq": [
            int(layer not in dense_layers and (layer + 1) % sparse_step == 0) for layer in range(num_layers)
        ],
        "moe_router_topk": require(hf, "num_experts_per_tok"),
        # Renormalising the chosen probabilities is the same as a softmax over the chosen logits.
        "moe_router_pre_softmax": not hf.get("norm_topk_prob", False),
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": "alltoall",
    }


def names(hf: HfConfig) -> tuple[Entry, ...]:
    """The name table of Qwen3-MoE."""
    return (*qwen3.names(hf), *EXPERTS)


FAMILY = Family("qwen3_moe", transformer_fields, names)
