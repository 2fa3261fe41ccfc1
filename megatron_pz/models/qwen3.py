"""Qwen3, dense: norms on queries and keys."""

from __future__ import annotations

from typing import Any

from megatron_pz.models.family import ATTENTION, MLP, QK_NORM, Family, HfConfig, decoder_fields, model_entries
from megatron_pz.models.names import Entry


def transformer_fields(hf: HfConfig) -> dict[str, Any]:
    """`TransformerConfig` fields of a Qwen3 config.json."""
    return {**decoder_fields(hf), "qk_layernorm": True}


def names(hf: HfConfig) -> tuple[Entry, ...]:
    """The name table of Qwen3."""
    return (*model_entries(hf), *ATTENTION, *QK_NORM, *MLP)


FAMILY = Family("qwen3", transformer_fields, names)
