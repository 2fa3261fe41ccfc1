"""What a rank really holds: after an update by state, and after a forward by what autograd keeps. Bytes.

Imported by workers; importing it chooses the CPU.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from megatron_pz.platform.select import select_platform

PLATFORM = select_platform("cpu")

from megatron.core import parallel_state  # noqa: E402  (the platform comes first)
from megatron.core.optimizer import ChainedOptimizer  # noqa: E402

from megatron_pz.batch.schedule import plan_update  # noqa: E402
from megatron_pz.config.schema import Config  # noqa: E402
from megatron_pz.models.family import HfConfig  # noqa: E402
from megatron_pz.train.deal import divisors  # noqa: E402
from megatron_pz.train.forward import on_device  # noqa: E402
from megatron_pz.train.model import build_model  # noqa: E402
from megatron_pz.train.parallel import init_parallel  # noqa: E402
from megatron_pz.train.step import Trainer  # noqa: E402
from megatron_pz.types import MicroBatch, Role, Sample  # noqa: E402

LENGTHS = (100, 60, 96)
BUDGET = sum(LENGTHS)  # tokens of a micro-batch


def storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Bytes by address, each storage once."""
    found = {}
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def everything() -> Iterator[torch.Tensor]:
    """Every tensor that Python knows of."""
    gc.collect()
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            yield thing


def samples(vocab_size: int) -> list[Sample]:
    """Two micro-batches for each of two ranks; every token but the first is trained."""
    rng = np.random.default_rng(1)
    made = []
    for index, length in enumerate(LENGTHS * 4):
        made.append(
            Sample(
                tuple(int(token) for token in rng.integers(0, vocab_size, length)),
                (1.0,) * length,
                (-5.0,) * length,
                1.0,
                Role.PREDICTOR,
                f"1.0.{index}",
            )
        )
    return made


def held(hf_config: HfConfig, config: Config) -> dict[str, Any]:
    """Bytes of parameters, gradients and optimizer state after an update, of all tensors, and of what a forward keeps."""
    before = storages(everything())
    parallel = init_parallel(config.parallel, PLATFORM, seed=1)
    trainer = Trainer(build_model(hf_config, config, PLATFORM, parallel), config, PLATFORM, parallel)
    plan = plan_update(
        samples(hf_config["vocab_size"]), max_tokens=BUDGET, dp_size=parallel.dp_size, **divisors(config)
    )
    trainer.step(plan, lr_step=1)
    parameters = storages(parameter for chunk in trainer.chunks for parameter in chunk.parameters())
    buffers = [buffer for chunk in trainer.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    gradients = storages(buffer.grad_data for buffer in buffers)
    optimizer = storages(_optimizer_tensors(trainer.optimizer))
    optimizer = {at: size for at, size in optimizer.items() if at not in parameters and at not in gradients}
    found = {
        "stage": parallel.pp_rank,
        "parameters": sum(parameters.values()),
        "gradients": sum(gradients.values()),
        "optimizer": sum(optimizer.values()),
        "all": sum(size for at, size in storages(everything()).items() if at not in before),
    }
    if parallel.pp_size == 1:
        batch = plan.micro_batches[parallel.dp_rank][0]
        found |= {
            "tokens": batch.num_tokens / parallel_state.get_context_parallel_world_size(),
            **kept_by_forward(trainer, batch, set(parameters)),
        }
    parallel_state.destroy_model_parallel()
    return found


def kept_by_forward(trainer: Trainer, batch: MicroBatch, parameters: set[int]) -> dict[str, int]:
    """Bytes that autograd keeps of one micro-batch, without the weights: in the forward, and in what the backward runs again."""
    context = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    on = on_device(batch, trainer.platform, context=context)
    first: list[torch.Tensor] = []
    again: list[torch.Tensor] = []
    kept = first

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = trainer.chunks[0](
            on.input_ids, on.position_ids, packed_seq_params=on.packed_seq_params, labels=on.labels, temperature=1.0
        )
        kept = again
        output[0].sum().backward()
    in_forward = storages(first)
    return {
        "kept": sum(size for at, size in in_forward.items() if at not in parameters),
        "again": sum(size for at, size in storages(again).items() if at not in parameters and at not in in_forward),
    }


def _optimizer_tensors(optimizer: Any) -> Iterator[torch.Tensor]:
    for part in optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]:
        for group in part.optimizer.param_groups:
            yield from group["params"]
        for state in part.optimizer.state.values():
            yield from (value for value in state.values() if torch.is_tensor(value))
