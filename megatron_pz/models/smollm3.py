"""SmolLM3: Llama with layers that have no positions."""

from __future__ import annotations

from typing import Any

from megatron_pz.models import llama
from megatron_pz.models.family import Family, HfConfig, decoder_fields, require


def transformer_fields(hf: HfConfig) -> dict[str, Any]:
    """`TransformerConfig` fields of a SmolLM3 config.json. Its `no_rope_layers` says 1 for layers *with* rotary positions."""
    num_layers, interval = require(hf, "num_hidden_layers"), hf.get("no_rope_layer_interval", 4)
    has_rope = hf.get("no_rope_layers") or [int((layer + 1) % interval != 0) for layer in range(num_layers)]
    return {**decoder_fields(hf), "no_rope_freq": [1 - int(flag) for flag in has_rope]}


FAMILY = Family("smollm3", transformer_fields, llama.names)
