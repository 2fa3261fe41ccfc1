"""Models that the real SGLang server of the tests serves: random weights, as small as the server takes them.

Weights are large enough (standard deviation 0.08) that the logits differ, and norms are not ones, so that a tensor which
was swapped or forgotten shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCAB_SIZE = 512
CONTEXT_LENGTH = 2048
LAYERS = 4
EXPERTS_PER_TOKEN = 2

QWEN3 = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": CONTEXT_LENGTH,
    "initializer_range": 0.08,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
QWEN3_MOE = QWEN3 | {
    "num_experts": 8,
    "num_experts_per_tok": EXPERTS_PER_TOKEN,
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
}


def make_dense(folder: Path, seed: int = 0) -> Path:
    """A Qwen3 with random float32 weights in `folder`, without a tokenizer: servers are spoken to in token ids."""
    return _make("Qwen3", QWEN3, folder, seed)


def make_moe(folder: Path, seed: int = 0) -> Path:
    """A Qwen3-MoE of 8 experts, of which each token takes 2."""
    return _make("Qwen3Moe", QWEN3_MOE, folder, seed)


def _make(prefix: str, fields: dict[str, Any], folder: Path, seed: int) -> Path:
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        built = getattr(transformers, f"{prefix}ForCausalLM")(getattr(transformers, f"{prefix}Config")(**fields))
        with torch.no_grad():
            for parameter in built.parameters():
                if parameter.dim() == 1:
                    parameter.uniform_(0.5, 1.5)
    built.to(torch.float32).save_pretrained(folder)
    return folder
