"""What a GPU would have to wait for: operations whose result the host needs before it can go on.

Counted on a CPU, by the operations that read a value out of a tensor or whose result's shape depends on values. On a GPU: tests/gpu.
"""

import sys
from collections import Counter

import pytest
from builders import sample

from megatron_pz.config.schema import Config, ModelConfig, TrainConfig
from megatron_pz.platform.select import select_platform

PLATFORM = select_platform("cpu")  # before Megatron is imported

import torch  # noqa: E402
from hf_models import MODELS, SMALL  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from megatron_pz.batch.schedule import plan_update  # noqa: E402
from megatron_pz.train.model import build_model  # noqa: E402
from megatron_pz.train.parallel import init_parallel, shutdown  # noqa: E402
from megatron_pz.train.step import Trainer  # noqa: E402
from megatron_pz.types import Role  # noqa: E402

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "is_nonzero", "equal"}
CONFIG = SMALL | MODELS["qwen3"].fields | {"model_type": "qwen3", "rope_theta": 1e4}


OF_THE_CPU = ("platform/local_modules.py", "platform/cpu_layers.py")
"""Attention and rotary positions of the local layers; Transformer Engine's take lengths that lie on the GPU."""


def _is_of_the_cpu(frame):
    while frame is not None:
        if frame.f_code.co_filename.endswith(OF_THE_CPU):
            return True
        frame = frame.f_back
    return False


class Waits(TorchDispatchMode):
    """Counts them."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(i is not None and i.dtype is torch.bool for i in args[1])
        if (name in WAITS or by_mask) and not _is_of_the_cpu(sys._getframe(1)):
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def parallel():
    yield init_parallel(Config().parallel, PLATFORM, seed=1)
    shutdown()


def seen(parallel, num_micro_batches, **train):
    config = Config(model=ModelConfig(init="random"), train=TrainConfig(**train))
    trainer = Trainer(build_model(CONFIG, config, PLATFORM, parallel), config, PLATFORM, parallel)
    samples = [
        sample((5, 9, 20), (7, 1), role=Role.GENERATOR, advantage=1.0 - 0.4 * number)
        for number in range(num_micro_batches)
    ]
    plan = plan_update(samples, max_tokens=5)
    assert len(plan.micro_batches[0]) == num_micro_batches
    with Waits() as waits:
        trainer.step(plan, lr_step=1)
    return waits.seen


@pytest.mark.parametrize(
    "train",
    [
        {},
        {"importance_sampling": "truncated", "dual_clip": 10.0, "loss_aggregation": "sequence_mean"},
    ],
)
def test_a_step_waits_as_often_with_four_micro_batches_as_with_one(parallel, train):
    one, four = seen(parallel, 1, **train), seen(parallel, 4, **train)
    assert one == four
    assert one["_local_scalar_dense"] > 0  # the step's own: loss, gradient norm, verdict


def test_the_count_would_see_one(parallel):
    with Waits() as waits:
        torch.tensor([1.0, 0.0]).nonzero()
        torch.tensor([1.0])[torch.tensor([True])].item()
    assert waits.seen == {"nonzero": 1, "index": 1, "_local_scalar_dense": 1}
