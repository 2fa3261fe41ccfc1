"""A refused update on disk: all that it takes to repeat it, one file a rank.

A dump holds tensors, numbers and strings only, so that reading one runs none of its content.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_pz.errors import CheckpointError, DiskError
from megatron_pz.types import MicroBatch, UpdatePlan

Weights = list[dict[str, torch.Tensor]]
"""Parameters of each model chunk of a rank, by name."""


@dataclass(frozen=True, eq=False)
class Dump:
    """A refused update as one rank saw it."""

    step: int
    rank: int
    world_size: int
    error: str  # what the refusal said
    settings: str  # config.toml of the run
    hf_config: dict[str, Any]  # config.json of the model
    plan: UpdatePlan  # this rank's micro-batches
    old_log_probs: list[np.ndarray] | None  # float32 [T] a micro-batch
    ref_log_probs: list[np.ndarray] | None  # the same, of the reference policy: float32 [T]
    weights: Weights  # before the update, and after it: it was refused

    @staticmethod
    def path(folder: Path, step: int, rank: int) -> Path:
        """Where the dump of a rank stands."""
        return folder / f"step_{step:06d}-rank{rank}.pt"


def write_dump(dump: Dump, folder: Path) -> Path:
    """Write `dump` into `folder`, whole or not at all; its path.

    Raises:
        DiskError: no room or no right.
    """
    path = Dump.path(folder, dump.step, dump.rank)
    partial = path.with_suffix(".tmp")
    record = {field.name: getattr(dump, field.name) for field in dataclasses.fields(Dump)}
    record |= {
        "hf_config": json.dumps(dump.hf_config),
        "plan": _plan_record(dump.plan),
        "old_log_probs": _tensors(dump.old_log_probs),
        "ref_log_probs": _tensors(dump.ref_log_probs),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(record, partial)
        partial.rename(path)
    except (OSError, RuntimeError) as error:  # torch's writer has only RuntimeError to say it
        with suppress(OSError):
            partial.unlink()
        raise DiskError(f"{path} could not be written: {error}.") from error
    return path


def read_dump(path: Path) -> Dump:
    """The dump at `path`.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    try:
        record = torch.load(path, weights_only=True)
        return Dump(
            **record
            | {
                "hf_config": json.loads(record["hf_config"]),
                "plan": _plan(record["plan"]),
                "old_log_probs": _arrays(record["old_log_probs"]),
                "ref_log_probs": _arrays(record["ref_log_probs"]),
            }
        )
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. Dumps stand in RUN_DIR/dumps.") from error
    except (RuntimeError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
        told = (str(error).splitlines() or [""])[0].rstrip(".")
        raise CheckpointError(
            f"{path} is no dump of a refused update, or is damaged ({type(error).__name__}: {told})."
        ) from error


def _plan_record(plan: UpdatePlan) -> dict[str, Any]:
    def portable(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return torch.from_numpy(value.copy())
        return value if value is None else list(value)

    names = [field.name for field in dataclasses.fields(MicroBatch)]
    micro_batches = [
        [{name: portable(getattr(batch, name)) for name in names} for batch in of_rank]
        for of_rank in plan.micro_batches
    ]
    return {"micro_batches": micro_batches, "num_tokens": plan.num_tokens, "num_samples": plan.num_samples}


def _plan(record: dict[str, Any]) -> UpdatePlan:
    def batch(fields: dict[str, Any]) -> MicroBatch:
        read: dict[str, Any] = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in fields.items()}
        return MicroBatch(**read | {"sample_indices": tuple(read["sample_indices"])})

    micro_batches = tuple(tuple(batch(fields) for fields in of_rank) for of_rank in record["micro_batches"])
    return UpdatePlan(micro_batches, record["num_tokens"], record["num_samples"])


def _tensors(arrays: Sequence[np.ndarray] | None) -> list[torch.Tensor] | None:
    return None if arrays is None else [torch.from_numpy(array.copy()) for array in arrays]


def _arrays(tensors: Sequence[torch.Tensor] | None) -> list[np.ndarray] | None:
    return None if tensors is None else [tensor.numpy() for tensor in tensors]
