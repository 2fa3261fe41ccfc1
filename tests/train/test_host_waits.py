"""No micro-batch makes the host wait for the device: the twin on a CPU of tests/gpu/test_host_waits_gpu.py.

A whole update of the real trainer runs under two nets (`tests/host_waits.py`); what is not of the CPU alone is a fault.
"""

from collections import Counter

import pytest
import torch
from host_waits import host_waits
from small_trainer import PLATFORM, SAMPLES, TINY  # selects the platform, before Megatron is imported

from megatron_pz.batch.schedule import plan_update
from megatron_pz.config.schema import Config, ModelConfig, TrainConfig
from megatron_pz.train import step as step_module
from megatron_pz.train.model import build_model
from megatron_pz.train.parallel import init_parallel, shutdown
from megatron_pz.train.step import Trainer

ALLOWED = {
    # Lengths of the batch's own array, before anything is copied to the device.
    "megatron_pz/platform/base.py:packed_seq_params",
    # The local layers go sequence by sequence; Transformer Engine's take cumulative lengths on the device.
    "megatron_pz/platform/cpu_layers.py:forward",
    "megatron_pz/platform/local_modules.py:_rotation",
    # Once a step, after the last micro-batch: Megatron reads the number of tokens that gradients are divided by.
    "megatron/distributed/finalize_model_grads.py:finalize_model_grads",
}


@pytest.fixture(scope="module")
def parallel():
    yield init_parallel(Config().parallel, PLATFORM, seed=1)
    shutdown()


@pytest.mark.parametrize(
    "train",
    [{}, {"importance_sampling": "truncated", "dual_clip": 3.0}, {"recompute_old_log_probs": True}],
    ids=["plain", "importance sampling", "old log-probs given"],
)
def test_a_micro_batch_waits_for_nothing_but_what_the_local_layers_need(parallel, monkeypatch, train):
    config = Config(model=ModelConfig(init="random"), train=TrainConfig(lr=1e-2, lr_decay_style="constant", **train))
    trainer = Trainer(build_model(TINY, config, PLATFORM, parallel), config, PLATFORM, parallel)
    plan = plan_update(SAMPLES, max_tokens=8)
    assert len(plan.micro_batches[0]) > 1
    old = trainer.score(plan.micro_batches[0]) if "recompute_old_log_probs" in train else None
    waits = []
    real = step_module.run_schedule

    def watched(*args, **kwargs):
        with host_waits() as found:
            result = real(*args, **kwargs)
        waits.extend(found)
        return result

    monkeypatch.setattr(step_module, "run_schedule", watched)
    assert trainer.step(plan, lr_step=1, old_log_probs=old).applied
    faults = Counter(wait for wait in waits if wait.split(" in ")[1] not in ALLOWED)
    assert faults == {}
    assert sum("finalize_model_grads" in wait for wait in waits) <= 1
    assert any("cpu_layers.py" in wait for wait in waits)  # the nets hold


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: float(x.sum()),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_fill_(x > 0, 1).tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: torch.tensor(3.0, device=x.device),
    ],
)
def test_each_way_to_wait_is_seen(wait):
    x = torch.ones(3)
    with host_waits() as found:
        wait(x)
    assert found


def test_what_stays_on_the_device_is_no_wait():
    x = torch.ones(3, requires_grad=True)
    with host_waits() as found:
        x.masked_fill(x < 0, 0.0).index_select(0, torch.arange(2)).exp().sum().backward()
    assert found == []
