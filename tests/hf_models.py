"""Small random models of `transformers`, one a family and trait, and what they answer.

Weights are large (standard deviation 0.2) and norms are not ones, so that a swapped or forgotten tensor shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

VOCAB_SIZE = 131  # prime: every layout has to pad it
LENGTHS = (11, 6, 1)  # of the sequences that are packed into one row

SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
EXPERTS = {"head_dim": 16, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}


@dataclass(frozen=True)
class Model:
    """A `transformers` class prefix and the fields of its config."""

    prefix: str
    fields: dict[str, Any] = field(default_factory=dict)


MODELS = {
    "qwen3": Model("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3 untied": Model("Qwen3", {"head_dim": 16, "tie_word_embeddings": False}),
    "llama": Model("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": False}),
    "llama linear": Model("Llama", {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 2.0}}),
    "smollm3": Model("SmolLM3", {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0], "tie_word_embeddings": True}),
    "qwen3_moe": Model("Qwen3Moe", EXPERTS | {"norm_topk_prob": True}),
    # The first layer dense, probabilities of the chosen experts not made to add up to 1.
    "qwen3_moe mixed": Model("Qwen3Moe", EXPERTS | {"norm_topk_prob": False, "mlp_only_layers": [0]}),
}


def make(
    name: str, folder: Path, dtype: torch.dtype = torch.float32, *, hidden_size: int = SMALL["hidden_size"], **save: Any
) -> None:
    """Write the model `name` into `folder`."""
    import transformers

    model = MODELS[name]
    torch.manual_seed(len(name))
    config = getattr(transformers, f"{model.prefix}Config")(
        **(SMALL | {"hidden_size": hidden_size, "rope_parameters": ROPE} | model.fields)
    )
    built = getattr(transformers, f"{model.prefix}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    built.to(dtype).save_pretrained(folder, **save)


def sequences() -> list[torch.Tensor]:
    """Token ids int64 [n] of each sequence."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, VOCAB_SIZE, (length,), generator=generator) for length in LENGTHS]


def expected_logits(folder: Path) -> torch.Tensor:
    """What `transformers` answers to each sequence alone: float32 [sum of LENGTHS, VOCAB_SIZE]."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        return torch.cat([model(ids[None]).logits[0] for ids in sequences()])


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the folder's safetensors files."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
