"""Megatron-Core's local layer specification with the layers of `cpu_layers` put in."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig


def local_layer_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Layers of this pipeline stage, dense or with experts as `config.moe_layer_freq` says; RMSNorm throughout."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.attention import SelfAttention
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from megatron_pz.platform.cpu_layers import PackedAttention, RMSNorm
    from megatron_pz.platform.local_modules import LocalSelfAttention, LocalTransformerLayer

    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=config.normalization, vp_stage=vp_stage
    )
    block.layer_norm = RMSNorm
    for layer in block.layer_specs:
        layer.submodules.input_layernorm = RMSNorm
        layer.submodules.pre_mlp_layernorm = RMSNorm
        if layer.module is TransformerLayer:
            layer.module = LocalTransformerLayer
        if layer.submodules.self_attention.module is SelfAttention:
            layer.submodules.self_attention.module = LocalSelfAttention
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = PackedAttention
        if config.qk_layernorm:
            attention.q_layernorm = RMSNorm
            attention.k_layernorm = RMSNorm
    return block


LOCAL_DEFAULTS = {
    # Fused kernels of these names exist on CUDA only, or need Transformer Engine or Apex.
    "transformer_impl": "local",
    "gradient_accumulation_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "persist_layer_norm": False,
    "moe_grouped_gemm": False,
    "moe_permute_fusion": False,
}
