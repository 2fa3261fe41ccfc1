"""What a model family is: its config.json read, and its name table. The lines that families share stand here too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_pz.errors import ModelError
from megatron_pz.models.names import Direct, Entry, Experts, FusedQKV, GatedMLP, Vocabulary
from megatron_pz.models.rope import RopeScaling, read_rope

HfConfig = Mapping[str, Any]


@dataclass(frozen=True)
class ModelFields:
    """What Megatron's `GPTModel` is told beside its `TransformerConfig`."""

    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    rotary_base: float
    rope_scaling: RopeScaling | None


@dataclass(frozen=True)
class Family:
    """One `model_type`. Example: `Family("llama", llama.transformer_fields, llama.names)`."""

    model_type: str
    transformer_fields: Callable[[HfConfig], dict[str, Any]]  # of TransformerConfig
    names: Callable[[HfConfig], tuple[Entry, ...]]

    def model_fields(self, hf: HfConfig) -> ModelFields:
        """Vocabulary, positions and tying.

        Raises:
            ModelError: a field is missing, or the rotary scaling is of an unknown kind.
        """
        base, scaling = read_rope(hf)
        return ModelFields(
            vocab_size=require(hf, "vocab_size"),
            max_position_embeddings=hf.get("max_position_embeddings", 32768),
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
            rotary_base=base,
            rope_scaling=scaling,
        )

    def is_moe_layer(self, hf: HfConfig) -> list[bool]:
        """For each layer, whether it has experts."""
        fields = self.transformer_fields(hf)
        if not fields.get("num_moe_experts"):
            return [False] * fields["num_layers"]
        return [bool(flag) for flag in fields["moe_layer_freq"]]

    def hf_names(self, hf: HfConfig) -> list[str]:
        """Names of every tensor of a whole HF checkpoint, in the order of the table, layer by layer."""
        num_experts = self.transformer_fields(hf).get("num_moe_experts") or 0
        entries = [entry for entry in self.names(hf) if entry.is_exported]
        found: list[str] = []
        for entry in entries:
            if entry.scope == "model":
                found += entry.hf_names()
        for layer, is_moe in enumerate(self.is_moe_layer(hf)):
            for entry in entries:
                if entry.scope in ("layer", "moe" if is_moe else "dense"):
                    experts: list[int | None] = [*range(num_experts)] if isinstance(entry.mapping, Experts) else [None]
                    found += [name for expert in experts for name in entry.hf_names(layer, expert)]
        return found


def require(hf: HfConfig, *names: str) -> Any:
    """The first of `names` that config.json has (newer and older spelling of one field).

    Raises:
        ModelError: it has none.
    """
    for name in names:
        if hf.get(name) is not None:
            return hf[name]
    raise ModelError(f"config.json of {hf.get('model_type')!r} has no {names[0]!r}; is it a whole model folder?")


def refuse(hf: HfConfig, *names: str) -> None:
    """Stop where config.json switches on something that the family's table has no place for.

    Raises:
        ModelError: one of `names` is on.
    """
    for name in names:
        if hf.get(name):
            raise ModelError(
                f"config.json has {name} = {hf[name]!r}; megatron_pz runs {hf.get('model_type')!r} only without it."
            )


def decoder_fields(hf: HfConfig) -> dict[str, Any]:
    """`TransformerConfig` fields of a decoder with RMSNorm, rotary positions, grouped queries and a gated SiLU MLP.

    Raises:
        ModelError: a field is missing, or one that these layers cannot express is on.
    """
    import torch.nn.functional as F

    refuse(hf, "attention_bias", "mlp_bias", "use_sliding_window")
    if hf.get("hidden_act", "silu") != "silu":
        raise ModelError(f"config.json has hidden_act = {hf['hidden_act']!r}; megatron_pz knows silu.")
    heads, hidden = require(hf, "num_attention_heads"), require(hf, "hidden_size")
    return {
        "num_layers": require(hf, "num_hidden_layers"),
        "hidden_size": hidden,
        "ffn_hidden_size": require(hf, "intermediate_size"),
        "num_attention_heads": heads,
        "num_query_groups": hf.get("num_key_value_heads") or heads,
        "kv_channels": hf.get("head_dim") or hidden // heads,
        "normalization": "RMSNorm",
        "layernorm_epsilon": hf.get("rms_norm_eps", 1e-6),
        "init_method_std": hf.get("initializer_range", 0.02),
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def model_entries(hf: HfConfig) -> tuple[Entry, ...]:
    """Embedding, final norm and head. A tied head exists in Megatron only on a last stage that is not the first."""
    embedding = "model.embed_tokens.weight"
    is_tied = bool(hf.get("tie_word_embeddings", False))
    head = Vocabulary(embedding if is_tied else "lm_head.weight")
    return (
        Entry(("embedding.word_embeddings.weight",), Vocabulary(embedding), "model"),
        Entry(("decoder.final_layernorm.weight",), Direct("model.norm.weight"), "model"),
        Entry(("output_layer.weight",), head, "model", is_exported=not is_tied),
    )


_M = "decoder.layers.{layer}."
_H = "model.layers.{layer}."

ATTENTION: tuple[Entry, ...] = (
    Entry(
        (_M + "input_layernorm.weight", _M + "self_attention.linear_qkv.layer_norm_weight"),
        Direct(_H + "input_layernorm.weight"),
    ),
    Entry(
        (_M + "self_attention.linear_qkv.weight",),
        FusedQKV(_H + "self_attn.q_proj.weight", _H + "self_attn.k_proj.weight", _H + "self_attn.v_proj.weight"),
    ),
    Entry((_M + "self_attention.linear_proj.weight",), Direct(_H + "self_attn.o_proj.weight", split=1)),
    Entry(
        (_M + "pre_mlp_layernorm.weight", _M + "mlp.linear_fc1.layer_norm_weight"),
        Direct(_H + "post_attention_layernorm.weight"),
    ),
)

QK_NORM: tuple[Entry, ...] = (
    Entry((_M + "self_attention.q_layernorm.weight",), Direct(_H + "self_attn.q_norm.weight")),
    Entry((_M + "self_attention.k_layernorm.weight",), Direct(_H + "self_attn.k_norm.weight")),
)

MLP: tuple[Entry, ...] = (
    Entry((_M + "mlp.linear_fc1.weight",), GatedMLP(_H + "mlp.gate_proj.weight", _H + "mlp.up_proj.weight"), "dense"),
    Entry((_M + "mlp.linear_fc2.weight",), Direct(_H + "mlp.down_proj.weight", split=1), "dense"),
)

_E = _H + "mlp.experts.{expert}."

EXPERTS: tuple[Entry, ...] = (
    Entry((_M + "mlp.router.weight",), Direct(_H + "mlp.gate.weight"), "moe"),
    Entry(
        (_M + "mlp.experts.local_experts.{expert}.linear_fc1.weight", _M + "mlp.experts.linear_fc1.weight{expert}"),
        Experts(GatedMLP(_E + "gate_proj.weight", _E + "up_proj.weight")),
        "moe",
    ),
    Entry(
        (_M + "mlp.experts.local_experts.{expert}.linear_fc2.weight", _M + "mlp.experts.linear_fc2.weight{expert}"),
        Experts(Direct(_E + "down_proj.weight", split=1)),
        "moe",
    ),
)
