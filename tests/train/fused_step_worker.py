"""One update of a tiny policy with the chunked and with the fused log-probs, the latter by Triton's interpreter.

Prints as JSON how far metrics and weights are apart; learning rate 1e-2.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported


import torch
from small_trainer import PLATFORM, SAMPLES, TINY  # selects the platform, before Megatron is imported

from megatron_pz.batch.schedule import plan_update
from megatron_pz.config.schema import Config, ModelConfig, TrainConfig
from megatron_pz.models.shards import unwrap
from megatron_pz.train.model import build_model
from megatron_pz.train.parallel import init_parallel, shutdown
from megatron_pz.train.step import Trainer


def update(kernel, parallel):
    """Metrics, gradients (before the update: the buffers keep them) and weights after it."""
    config = Config(
        model=ModelConfig(init="random"),
        train=TrainConfig(lr=1e-2, lr_decay_style="constant", log_prob_kernel=kernel),
    )
    trainer = Trainer(build_model(TINY, config, PLATFORM, parallel), config, PLATFORM, parallel)
    assert unwrap(trainer.chunks[0]).log_prob_kernel == kernel
    result = trainer.step(plan_update(SAMPLES, max_tokens=8), lr_step=1)
    assert result.applied
    gradients = {name: p.main_grad.clone() for name, p in trainer.chunks[0].module.named_parameters()}
    weights = {name: p.detach().clone() for name, p in trainer.chunks[0].module.named_parameters()}
    return result.metrics, gradients, weights


def apart(one, two):
    return max((one[name] - two[name]).abs().max().item() for name in one)


if __name__ == "__main__":
    torch.set_num_threads(1)
    parallel = init_parallel(Config().parallel, PLATFORM, seed=1)
    chunked, fused = (update(kernel, parallel) for kernel in ("chunked", "fused"))
    metrics = max(abs(chunked[0][name] - fused[0][name]) for name in chunked[0])
    largest = max(value.abs().max().item() for value in chunked[1].values())
    shutdown()
    print(
        json.dumps(
            {
                "metrics": metrics,
                "gradients": apart(chunked[1], fused[1]) / largest,
                "weights": apart(chunked[2], fused[2]),
                "moved": max(value.abs().max().item() for value in chunked[1].values()),
            }
        )
    )
