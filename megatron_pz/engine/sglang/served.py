"""Is what a server serves the model that is trained? A tensor of another shape would end the server."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_pz.errors import EngineError

SHAPES = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "num_experts", "moe_intermediate_size", "tie_word_embeddings"),
)
"""Fields of config.json that decide the shapes of weights."""


def check_served(url: str, info: Mapping[str, Any], hf_config: Mapping[str, Any]) -> None:
    """Pass if the server at `url` has a model of `hf_config`'s shape.

    Args:
        info: the server's `/model_info`. Where its model's folder can be read from here, all shapes are compared;
            elsewhere the model's type alone.

    Raises:
        EngineError: names the fields that differ.
    """
    served = {"model_type": info.get("model_type")}
    try:
        served = json.loads((Path(str(info["model_path"])) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError):
        pass  # a hub name, or a disk that this machine does not see
    if hf_config.get("model_type") == "qwen3_moe" and (
        hf_config.get("mlp_only_layers") or hf_config.get("tie_word_embeddings")
    ):
        raise EngineError(
            f"mlp_only_layers is {hf_config.get('mlp_only_layers')} and tie_word_embeddings {hf_config.get('tie_word_embeddings')}: "
            "SGLang 0.5.23 gives every layer of a qwen3_moe model experts, and a head of its own, and would answer nonsense. "
            "Use --engine embedded."
        )
    different = [
        f"{name} is {served[name]} there and {hf_config[name]} here"
        for name in SHAPES
        if name in served and name in hf_config and served[name] != hf_config[name]
    ]
    if different:
        raise EngineError(
            f"The server at {url} serves {info.get('model_path')}, another model than the one that is trained: "
            f"{'; '.join(different)}. Start it with the folder of --hf-model, or name other --server-urls."
        )
