"""Models and layouts whose planned bytes are compared with allocated ones."""

from __future__ import annotations

from typing import Any

from megatron_pz.config.schema import Config, ModelConfig, ParallelConfig, TrainConfig

DENSE = {
    "model_type": "qwen3",
    "vocab_size": 6000,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
MOE = DENSE | {
    "model_type": "qwen3_moe",
    "tie_word_embeddings": False,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
    "mlp_only_layers": [0],
}
LLAMA = DENSE | {"model_type": "llama", "tie_word_embeddings": False}
NOPE = DENSE | {"model_type": "smollm3", "no_rope_layer_interval": 2}
LARGE = {"vocab_size": 20000}  # beside it, batches and tables of positions are small
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2}
BLOCK = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 3}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}
EXPERTS_AGAIN = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "moe"]}


def case(model: dict[str, Any], dtype: str = "bfloat16", transformer: Any = None, **sizes: Any) -> dict[str, Any]:
    return {"model": model, "dtype": dtype, "transformer": transformer or {}, "sizes": sizes}


def config_of(found: dict[str, Any]) -> Config:
    return Config(
        model=ModelConfig(hf_model="m", init="random", params_dtype=found["dtype"]),
        parallel=ParallelConfig(**found["sizes"]),
        train=TrainConfig(max_tokens_per_micro_batch=256),
        transformer=found["transformer"],
    )


ALONE = {
    "dense": case(DENSE),
    "dense, float32": case(DENSE, "float32"),
    "llama": case(LLAMA),
    "smollm3": case(NOPE),
    "moe": case(MOE),
    "dense, all recomputed": case(DENSE, transformer=FULL),
    "dense, three recomputed": case(DENSE, transformer=BLOCK),
    "dense, some recomputed": case(DENSE, transformer=SELECTIVE),
    "moe, experts recomputed": case(MOE, "float32", EXPERTS_AGAIN),
}
OF_TWO = {
    "dp2": case(DENSE),
    "dp2, whole optimizer": case(DENSE, use_distributed_optimizer=False),
    "tp2": case(DENSE, tensor_model_parallel_size=2),
    "tp2 sp": case(LLAMA, tensor_model_parallel_size=2, sequence_parallel=True),
    "smollm3 tp2": case(NOPE, tensor_model_parallel_size=2),
    "cp2": case(LLAMA, context_parallel_size=2),
    "smollm3 cp2": case(NOPE, context_parallel_size=2),
    "cp2, all recomputed": case(DENSE, transformer=FULL, context_parallel_size=2),
    "cp2, some recomputed": case(LLAMA, transformer=SELECTIVE, context_parallel_size=2),
    "moe cp2 ep2": case(MOE, context_parallel_size=2, expert_model_parallel_size=2),
    "tp2 sp, all recomputed": case(DENSE, transformer=FULL, tensor_model_parallel_size=2, sequence_parallel=True),
    "pp2, tied": case(DENSE, pipeline_model_parallel_size=2),
    "pp2, one recomputed": case(LLAMA, transformer=BLOCK | {"recompute_num_layers": 1}, pipeline_model_parallel_size=2),
    "pp2, two pieces": case(LLAMA, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    "moe ep2": case(MOE, expert_model_parallel_size=2),
    "moe ep2, whole optimizer": case(MOE, "float32", expert_model_parallel_size=2, use_distributed_optimizer=False),
    "moe tp2 sp ep2": case(MOE, tensor_model_parallel_size=2, sequence_parallel=True, expert_model_parallel_size=2),
}
OF_FOUR = {
    "moe dp4 ep2": case(MOE | LARGE, expert_model_parallel_size=2),
    "tp2 pp2": case(DENSE | LARGE, tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
    "cp4": case(DENSE, context_parallel_size=4),
    "moe cp2 tp2 sp": case(
        MOE, context_parallel_size=2, tensor_model_parallel_size=2, sequence_parallel=True, expert_model_parallel_size=2
    ),
    "cp2 dp2": case(LLAMA | LARGE, context_parallel_size=2),
    "moe tp2 sp pp2 ep2": case(
        MOE | LARGE,
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        pipeline_model_parallel_size=2,
        expert_model_parallel_size=2,
    ),
}
