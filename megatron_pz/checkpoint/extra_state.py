"""What layers keep beside parameters: Transformer Engine's FP8 scales, which a checkpoint of other layers has not.

Without them scales are measured anew, which they are in every step but under `model.fp8 = "delayed"`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

from megatron_pz.errors import CheckpointError

STATE = "_extra_state"


def drop_absent_states(wanted: dict[str, Any], shards: Path) -> None:
    """Take extra states that the checkpoint in `shards` has not out of `wanted`, Megatron's description of what is loaded."""
    models = [part for name, part in wanted.items() if name.startswith("model")]
    if not any(_is_state(value) for part in models for value in part.values()):
        return
    saved = {found.key for found in load_sharded_metadata(str(shards)).values()}
    for part in models:
        for name in [name for name, value in part.items() if _is_state(value) and value.key not in saved]:
            del part[name]


def load_state(model: torch.nn.Module, state: Mapping[str, Any]) -> None:
    """`model.load_state_dict(state)`, where only extra states may be missing or left over.

    Raises:
        CheckpointError: a parameter is missing or left over.
    """
    missing, unexpected = model.load_state_dict(state, strict=False)
    if odd := [name for name in (*missing, *unexpected) if STATE not in name]:
        raise CheckpointError(f"the checkpoint and the model differ in {', '.join(sorted(odd)[:8])}.")


def _is_state(value: Any) -> bool:
    return isinstance(value, ShardedObject) and STATE in value.key
