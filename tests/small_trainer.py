"""A tiny Qwen3 with its optimizer in one process, and samples of both roles for it.

from small_trainer import SAMPLES, TINY, log_probs_of, losses, new_trainer, save, scored, weights
"""

from dataclasses import replace

import torch
from builders import sample

from megatron_pz.config.schema import Config, ModelConfig, TaskConfig, TrainConfig
from megatron_pz.platform.select import select_platform

PLATFORM = select_platform("cpu")  # before Megatron is imported

from megatron_pz.batch.schedule import plan_update  # noqa: E402
from megatron_pz.models.shards import unwrap  # noqa: E402
from megatron_pz.train.model import build_model  # noqa: E402
from megatron_pz.train.step import Trainer  # noqa: E402
from megatron_pz.types import Role  # noqa: E402

TINY = {
    "model_type": "qwen3",
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
MOE = TINY | {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
}
SAMPLES = [
    sample((5, 9, 20), (7, 1), role=Role.GENERATOR, advantage=1.0),
    sample((5, 9), (11, 3, 1), advantage=-0.5),
    sample((6, 2), (12, 1), advantage=0.5),
]
CONFIG = Config(
    model=ModelConfig(init="random"),
    task=TaskConfig(task="continue_pt"),
    train=TrainConfig(lr=1e-2, lr_decay_style="constant"),
)
AS_TEXT = [replace(s, role=None, advantage=1.0) for s in SAMPLES]
TEXT = [replace(sample((5, 9, 20), (7, 1)), role=None), replace(sample((6, 2), (12, 1)), role=None)]


def new_trainer(parallel, hf_config=TINY, seed=1):
    config = replace(CONFIG, train=replace(CONFIG.train, seed=seed))
    return Trainer(build_model(hf_config, config, PLATFORM, parallel), config, PLATFORM, parallel)


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.chunks[0].named_parameters()}


def losses(trainer, num_steps):
    plan = plan_update(TEXT, max_tokens=64)
    return [trainer.step(plan, lr_step=step).loss for step in range(1, num_steps + 1)]


def save(store, step, trainer, **more):
    return store.save(step, trainer.chunks, trainer.optimizer, f'{{"step": {step}}}', **more)


def logits_of(trainer, token_ids, grad=False):
    """The model's own logits of one sequence, [tokens, vocabulary], by its other path."""
    ids = torch.tensor([token_ids])
    with torch.set_grad_enabled(grad):
        return unwrap(trainer.chunks[0])(ids, torch.arange(len(token_ids))[None])[0]


def log_probs_of(trainer, token_ids, temperature=1.0, grad=False):
    """Of each token after the first."""
    table = (logits_of(trainer, token_ids, grad) / temperature).log_softmax(-1)
    return table[:-1].gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0]


def scored(trainer, samples):
    """The samples with the trainer's own log-probs as the engine's."""
    return [
        replace(s, rollout_log_probs=(0.0, *log_probs_of(trainer, s.token_ids, trainer.temperature).tolist()))
        for s in samples
    ]
