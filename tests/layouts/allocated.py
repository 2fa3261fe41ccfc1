"""What a rank really holds: after an update by state, and after a forward by what autograd keeps. Bytes.

Imported by workers; importing it chooses the CPU.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
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
from megatron_pz.train.model import build_model  # noqa: E402
from megatron_pz.train.parallel import init_parallel  # noqa: E402
from megatron_pz.train.step import Trainer  # noqa: E402
from megatron_pz.types import Role, Sample  # noqa: E402

LENGTHS = (104, 56, 96)  # multiples of what four context-parallel ranks share out
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


class Saved:
    """A tensor that autograd keeps, counted as long as it does."""

    def __init__(self, tensor: torch.Tensor, counter: SavedBytes) -> None:
        storage = tensor.untyped_storage()
        self.tensor, self._counter, self._at = tensor, counter, storage.data_ptr()
        counter.change(self._at, storage.nbytes(), 1)

    def __del__(self) -> None:
        self._counter.change(self._at, self.tensor.untyped_storage().nbytes(), -1)


class SavedBytes:
    """Bytes that autograd keeps within a `with`, and the schedule for it, each storage once: now, and at most."""

    def __init__(self, without: set[int]) -> None:
        self._without, self._times = without, dict[int, int]()
        self.now = self.most = 0

    def change(self, at: int, size: int, by: int) -> None:
        was = self._times.get(at, 0)
        self._times[at] = was + by
        if was == 0 or was + by == 0:
            self.now += by * size
            self.most = max(self.most, self.now)

    def hold(self, tensor: torch.Tensor) -> None:
        """Count `tensor` as long as anybody has it."""
        storage = tensor.untyped_storage()
        place = storage.data_ptr(), storage.nbytes()
        self.change(*place, 1)
        weakref.finalize(tensor, self.change, *place, -1)

    def counted(self) -> AbstractContextManager[Any]:
        def keep(tensor: torch.Tensor) -> torch.Tensor | Saved:
            return tensor if tensor.untyped_storage().data_ptr() in self._without else Saved(tensor, self)

        return torch.autograd.graph.saved_tensors_hooks(
            keep, lambda kept: kept.tensor if isinstance(kept, Saved) else kept
        )


def samples(vocab_size: int) -> list[Sample]:
    """Two micro-batches for each of two ranks, all alike: experts get as much of one as of another. Every token but the
    first of a sample is trained."""
    made = []
    for index, length in enumerate(LENGTHS * 4):
        rng = np.random.default_rng(length)
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
    """Bytes of parameters, gradients and optimizer state after an update, of all tensors, and of what autograd keeps at the
    fullest moment of the next; and the row that it is kept of."""
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
    saved = SavedBytes(set(parameters))
    for chunk in trainer.chunks:  # a pipeline keeps what its stages sent
        chunk.register_forward_hook(lambda module, args, output: saved.hold(output))
    with saved.counted():
        trainer.step(plan, lr_step=2)
    gc.collect()
    assert saved.now == 0, "a graph is still there"
    rows = plan.micro_batches[parallel.dp_rank]
    (lengths,) = {tuple(sorted(np.diff(row.cu_seqlens).tolist())) for row in rows}
    found |= {"kept": saved.most, "lengths": lengths, "micro_batches": len(rows)}
    parallel_state.destroy_model_parallel()
    return found


def _optimizer_tensors(optimizer: Any) -> Iterator[torch.Tensor]:
    for part in optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]:
        for group in part.optimizer.param_groups:
            yield from group["params"]
        for state in part.optimizer.state.values():
            yield from (value for value in state.values() if torch.is_tensor(value))
