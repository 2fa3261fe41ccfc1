"""Megatron's optimizer with a share in host memory: what it holds when weights come before it, and when they come after.

Megatron's own `HybridDeviceOptimizer`, on a CPU. There its masters are its own parameters, not copies of a GPU's; it makes them
at the same place, and cannot make a step.
"""

from dataclasses import replace

import pytest
import torch
from small_trainer import CONFIG, PLATFORM, TINY, losses, save

from megatron_pz.checkpoint.store import CheckpointStore
from megatron_pz.errors import CheckpointError, ConfigError
from megatron_pz.train.model import build_model
from megatron_pz.train.optimizer import build_optimizer, optimizer_config
from megatron_pz.train.step import Trainer


@pytest.fixture(params=[True, False], ids=["shared out", "whole"])
def config(request):
    offload = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 1.0}
    parallel = replace(CONFIG.parallel, use_distributed_optimizer=request.param)
    return replace(CONFIG, model=replace(CONFIG.model, params_dtype="bfloat16"), parallel=parallel, optimizer=offload)


def made(config, parallel, fill):
    """Chunks with all weights `fill`, and Megatron's optimizer over them, made after that."""
    from megatron.core.optimizer import get_megatron_optimizer

    chunks = build_model(TINY, config, PLATFORM, parallel)
    put(chunks, fill)
    return chunks, get_megatron_optimizer(optimizer_config(config), list(chunks))


@torch.no_grad()
def put(chunks, value):
    for parameter in chunks[0].parameters():
        parameter.fill_(value)


def masters(optimizer):
    """Every number that the first update would begin with."""
    [part] = getattr(optimizer, "chained_optimizers", [optimizer])
    assert type(part.optimizer).__name__ == "HybridDeviceOptimizer"
    held = [p for inner in part.optimizer.sub_optimizers for group in inner.param_groups for p in group["params"]]
    assert all(parameter.dtype == torch.float32 for parameter in held)
    return torch.cat([parameter.detach().flatten() for parameter in held])


def test_masters_are_the_weights_that_came_before_it(config, parallel):
    chunks, optimizer = made(config, parallel, 0.5)
    assert masters(optimizer).numel() == sum(parameter.numel() for parameter in chunks[0].parameters())
    assert torch.equal(masters(optimizer).unique(), torch.tensor([0.5]))


def test_weights_that_come_after_it_leave_its_masters_stale(config, parallel):
    chunks, optimizer = made(config, parallel, 0.5)
    put(chunks, 2.0)
    assert torch.equal(masters(optimizer).unique(), torch.tensor([0.5]))
    optimizer.reload_model_params()  # what renews the masters of others
    assert torch.equal(masters(optimizer).unique(), torch.tensor([0.5]))


def test_a_run_that_would_go_on_with_it_is_refused(config, parallel, tmp_path):
    plain = replace(config, optimizer={})
    trainer = Trainer(build_model(TINY, plain, PLATFORM, parallel), plain, PLATFORM, parallel)
    losses(trainer, 1)
    store = CheckpointStore(tmp_path / "checkpoints", 2, parallel.control_group)
    save(store, 1, trainer)
    chunks, optimizer = made(config, parallel, 0.5)
    with pytest.raises(
        CheckpointError, match="step_000001 cannot be gone on from with optimizer.optimizer_cpu_offload.*--load"
    ):
        store.load(1, chunks, optimizer)


def test_on_a_cpu_it_is_refused_before_its_first_step(config, parallel):
    with pytest.raises(ConfigError, match="on the platform cpu.*Leave it out"):
        build_optimizer(build_model(TINY, config, PLATFORM, parallel), config)
