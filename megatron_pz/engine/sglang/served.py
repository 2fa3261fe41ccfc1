"""Is what a server serves the model that is trained? A tensor of another shape would end the server."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_pz.config.fp8 import BLOCK, QUANTIZATION_CONFIG
from megatron_pz.errors import ConfigError, EngineError

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


def check_precision(url: str, info: Mapping[str, Any], server_info: Mapping[str, Any], rollout_precision: str) -> None:
    """Pass if the server at `url` has room for weights of `rollout_precision`.

    A tensor of another dtype is taken without a word: bfloat16 would land in FP8 without its scales.

    Args:
        info: the server's `/model_info`.
        server_info: its `/server_info`. Where neither its flags tell nor its model's folder can be read, nothing is known.

    Raises:
        EngineError: it has room for others.
    """
    found = json.loads(server_info.get("json_model_override_args") or "{}").get("quantization_config")
    if found is None:
        try:
            served = json.loads((Path(str(info["model_path"])) / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError):
            return
        found = served.get("quantization_config") or {}
    wanted = QUANTIZATION_CONFIG if rollout_precision == "fp8_blockwise" else {}
    if any(found.get(name) != wanted.get(name) for name in ("quant_method", "weight_block_size")):
        raise EngineError(
            f"The server at {url} has quantization_config {found or None}, and sglang.rollout_precision is {rollout_precision!r}. "
            "Start it with the same --rollout-precision (tools/serve.py), or with a folder that tools/convert_checkpoint.py "
            "--dtype fp8_blockwise made."
        )


def check_blocks(hf_config: Mapping[str, Any], server_ranks: int) -> None:
    """Pass if blocks of FP8 end where the parts of SGLang's fused and split weights end.

    Args:
        server_ranks: tensor-parallel size of a server.

    Raises:
        ConfigError: names the part that is no multiple of a block.
    """
    heads = int(hf_config["num_attention_heads"])
    keys = int(hf_config.get("num_key_value_heads") or heads)
    head_dim = int(hf_config.get("head_dim") or hf_config["hidden_size"] // heads)
    inner = "moe_intermediate_size" if hf_config.get("moe_intermediate_size") else "intermediate_size"
    parts = {
        "queries (num_attention_heads * head_dim)": heads * head_dim // server_ranks,
        "keys (num_key_value_heads * head_dim)": max(1, keys // server_ranks) * head_dim,
        inner: int(hf_config[inner]) // server_ranks,
    }
    for what, size in parts.items():
        if size % BLOCK:
            raise ConfigError(
                f"sglang.rollout_precision is 'fp8_blockwise', but a server's part of {what} is {size} over {server_ranks} "
                f"GPUs, no multiple of {BLOCK}, which SGLang refuses. Use other --gpus-per-server, or --rollout-precision trained."
            )
