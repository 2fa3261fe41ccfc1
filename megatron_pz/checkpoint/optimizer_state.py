"""What the optimizer of a run keeps of each parameter, the same whatever holds it.

Megatron's own saved forms differ between layouts: experts that are shared out have an optimizer, and names, of their own
(`chained_1.`); the distributed optimizer saves masters that in float32 equal the weights; without it there are none. Here each
number is named by its parameter alone, so a checkpoint of any layout is read under any other. Ranks save what they hold: nothing
is gathered.

    optimizer.state.exp_avg.KEY, optimizer.state.exp_avg_sq.KEY, and where weights are narrower than float32 optimizer.state.param.KEY
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_pz.checkpoint.pieces import PieceReader
from megatron_pz.checkpoint.places import Place, Saved, places_of_range
from megatron_pz.errors import CheckpointError

PREFIX, MASTER = "optimizer.state", "param"


@dataclass(frozen=True, eq=False)
class Held:
    """State of one parameter, or of a range of its numbers."""

    parameter: Tensor  # of the model, this rank's: [...] of `model.params_dtype`
    start: int
    stop: int  # the range, counted row by row
    tensors: dict[str, Tensor]  # by name, [stop - start] each in the optimizer's dtype; `param` is the master
    fill: Callable[[dict[str, Tensor]], None]  # takes such tensors, [stop - start] of any floating dtype
    instance: (
        int | None
    )  # where data-parallel ranks share the state out: which of its equal copies; None: each has all of it

    @property
    def has_master(self) -> bool:
        """Whether the master says more than the weight."""
        return self.tensors[MASTER].dtype != self.parameter.dtype


def held(optimizer: MegatronOptimizer) -> Iterator[Held]:
    """What this rank holds, parameter by parameter."""
    for part in _parts(optimizer):
        _start(part)
        yield from _held_in_part(part) if isinstance(part, DistributedOptimizer) else _held_whole(part)


def describe(state: Mapping[str, Any]) -> dict[int, Saved]:
    """What Megatron's sharded state dicts of the model's chunks say of each parameter, by its `id`."""
    return {id(one.data): one for one in nested_values(state) if isinstance(one, (ShardedTensor, ShardedTensorFactory))}


def pieces_to_save(optimizer: MegatronOptimizer, saved: Mapping[int, Saved]) -> Iterator[tuple[Place, Tensor]]:
    """Every piece of state that this rank is the one to save, [*place.shape] in the optimizer's dtype."""
    for one in held(optimizer):
        known = saved[id(one.parameter)]
        replica = known.replica_id if one.instance is None else (*known.replica_id[:2], one.instance)
        if any(replica):
            continue
        places = places_of_range(known, one.parameter.shape, one.start, one.stop)
        for name, tensor in one.tensors.items():
            if name == MASTER and not one.has_master:
                continue
            for place, values in zip(places, tensor.split([place.numel for place in places]), strict=True):
                named = dataclasses.replace(place, key=f"{PREFIX}.{name}.{place.key}")
                yield named, values.reshape(place.shape)


@torch.no_grad()
def load(optimizer: MegatronOptimizer, saved: Mapping[int, Saved], reader: PieceReader, step: int) -> None:
    """Put back what was saved under any layout, once the model has its weights.

    Args:
        step: updates that the optimizer had made.

    Raises:
        CheckpointError: the checkpoint has no optimizer state, or a part of it is missing; or `optimizer` keeps copies on the host.
    """
    if any(hasattr(part.optimizer, "sub_optimizers") for part in _parts(optimizer)):
        raise CheckpointError(
            f"{reader.folder.parent} cannot be gone on from with optimizer.optimizer_cpu_offload: Megatron copies masters to the host "
            "when the optimizer is made, and has no way to renew them. Leave it out, or begin a new --run-dir with --load."
        )
    names = _Names(reader)
    for one in held(optimizer):
        places = places_of_range(saved[id(one.parameter)], one.parameter.shape, one.start, one.stop)
        found = {}
        for name, tensor in one.tensors.items():
            if name == MASTER and not one.has_master:
                found[name] = one.parameter.detach().reshape(-1)[one.start : one.stop].clone()
                continue
            read = [reader.read(dataclasses.replace(place, key=names.of(name, place.key))) for place in places]
            found[name] = torch.cat([piece.reshape(-1) for piece in read]).to(tensor)
        one.fill(found)
    for part in _parts(optimizer):
        _set_step(part, step)


def step_of(optimizer: MegatronOptimizer) -> int:
    """Updates that the optimizer has made; 0 on a rank that holds none of its state."""
    steps = [0]
    for part in _parts(optimizer):
        for inner in getattr(
            part.optimizer, "sub_optimizers", [part.optimizer]
        ):  # several where a share is on the host
            steps += [int(group["step"]) for group in inner.param_groups if group.get("step") is not None]
            steps += [int(state["step"]) for state in inner.state.values() if "step" in state]
    return max(steps)


def saved_step(common: Any) -> int:
    """The same of a checkpoint that Megatron wrote, from what `common.pt` holds."""
    if isinstance(common, dict):
        own = [int(value) for name, value in common.items() if name in ("step", "common_step")]
        return max([0, *own, *(saved_step(value) for value in common.values())])
    return max([0, *(saved_step(value) for value in common)]) if isinstance(common, list) else 0


class _Names:
    """Keys in a checkpoint, also in one that Megatron wrote, whose chained optimizers have a prefix each."""

    def __init__(self, reader: PieceReader) -> None:
        self._keys: dict[str, str] = {}
        for key in reader.tensor_keys():
            prefix, found, rest = key.partition(f"{PREFIX}.")
            if found and (not prefix or prefix.startswith("chained_")):
                self._keys[rest] = key
        self._all, self._folder = reader.tensor_keys(), reader.folder

    def of(self, name: str, key: str) -> str:
        """Key of the state `name` of the parameter `key`; the weight itself where its master was not saved."""
        for candidate in (name, "fp32_param") if name == MASTER else (name,):
            if (found := self._keys.get(f"{candidate}.{key}")) is not None:
                return found
        if name == MASTER and key in self._all:
            return key
        raise CheckpointError(
            f"{self._folder.parent} has no {name} of {key}: it holds weights without an optimizer. "
            "Begin a run from it with --load."
        )


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    chained = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return [part for part in chained if not getattr(part, "is_stub_optimizer", False)]


def _start(part: Any) -> None:
    """Moments of step 0, where no update was made and none loaded. (Ours of torch's Adam are there from the beginning.)"""
    if not part.optimizer.state and part.init_state_fn is not None:
        part.init_state_fn(part.optimizer, part.config)


def _held_in_part(part: Any) -> Iterator[Held]:
    for ranges in part.gbuf_ranges:
        for buckets in ranges.values():
            for bucket in buckets:
                for parameter, where in bucket["param_map"].items():
                    span = where["param"]
                    tensors = _of_size(part._get_main_param_and_optimizer_states(parameter), span.end - span.start)

                    def fill(values: dict[str, Tensor], parameter: Tensor = parameter) -> None:
                        part._set_main_param_and_optimizer_states(parameter, values)

                    yield Held(parameter, span.start, span.end, tensors, fill, part.distributed_optimizer_instance_id)


def _held_whole(part: Any) -> Iterator[Held]:
    halves = zip(getattr(part, "float16_groups", ()), getattr(part, "fp32_from_float16_groups", ()), strict=True)
    weights = {
        id(main): weight for group, mains in halves for weight, main in zip(group, mains, strict=True)
    }  # of a master
    for group in part.optimizer.param_groups:
        for main in group["params"]:
            tensors = _of_size({MASTER: main, **part.optimizer.state[main]}, main.numel())

            def fill(values: dict[str, Tensor], tensors: dict[str, Tensor] = tensors) -> None:
                for name, tensor in tensors.items():
                    tensor.copy_(values[name])

            yield Held(weights.get(id(main), main), 0, main.numel(), tensors, fill, None)


def _of_size(tensors: Mapping[str, Any], numel: int) -> dict[str, Tensor]:
    return {
        name: value.detach().reshape(-1)
        for name, value in tensors.items()
        if name != "step" and isinstance(value, Tensor) and value.numel() == numel
    }


def _set_step(part: Any, step: int) -> None:
    """Torch's Adam counts for each parameter, Transformer Engine's for each group."""
    inner = part.optimizer
    counts_itself = isinstance(inner, (torch.optim.Adam, torch.optim.AdamW))
    for state in inner.state.values() if counts_itself else ():
        state["step"] = torch.tensor(float(step))
    for group in inner.param_groups if not counts_itself else ():
        group["step"] = step
