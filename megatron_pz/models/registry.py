"""Every family, by the `model_type` of its config.json."""

from __future__ import annotations

import difflib

from megatron_pz.errors import ModelError
from megatron_pz.models import llama, qwen3, qwen3_moe, smollm3
from megatron_pz.models.family import Family, HfConfig

FAMILIES: dict[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in (qwen3, qwen3_moe, smollm3, llama)}


def family(hf: HfConfig) -> Family:
    """The family of a config.json.

    Raises:
        ModelError: its `model_type` is not in `FAMILIES`.
    """
    model_type = str(hf.get("model_type"))
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    nearest = difflib.get_close_matches(model_type, FAMILIES, n=1, cutoff=0.0)[0]
    raise ModelError(
        f"config.json has model_type {model_type!r}; megatron_pz knows {', '.join(FAMILIES)} (nearest: {nearest}). "
        "A new family is one file in megatron_pz/models and one line in registry.py."
    )
