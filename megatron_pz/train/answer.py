"""A policy that answers and does not train: the trainer's model without gradients and optimizer, under the embedded engine."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TypeVar

import torch
from megatron.core.transformer.module import Float16Module, MegatronModule

from megatron_pz.checkpoint.checksum import of_file
from megatron_pz.checkpoint.hf_import import load_hf_weights
from megatron_pz.checkpoint.manifest import MANIFEST
from megatron_pz.checkpoint.store import load_weights
from megatron_pz.config.layout_rules import world_is_divided
from megatron_pz.config.schema import Config
from megatron_pz.engine.base import converse
from megatron_pz.errors import CheckpointError, LayoutError
from megatron_pz.models.folder import read_hf_config, resolve_folder
from megatron_pz.models.policy import build_policy
from megatron_pz.platform.select import select_platform
from megatron_pz.train.decode import embedded_engine
from megatron_pz.train.parallel import init_parallel, shutdown
from megatron_pz.types import Generate

T = TypeVar("T")


def with_each_policy(
    config: Config,
    checkpoints: Sequence[Path | None],
    ask: Callable[[Path | None, str, Generate], Awaitable[T]],
) -> list[T | None]:
    """What `ask(checkpoint, name of its weights, generate)` comes to for each, on rank 0; None elsewhere. All ranks.

    Args:
        config: sections model, parallel, engine, train and transformer are read.
        checkpoints: folders `step_N` of a run of any layout; None: the weights of `model.hf_model`.

    Raises:
        LayoutError: the layout does not fit the ranks, or has pipeline stages: only whole models sample.
        CheckpointError, ModelError: weights that are not there, damaged, or of another model.
    """
    _check_layout(config)
    platform = select_platform()
    if platform.name == "cpu":
        torch.set_num_threads(1)  # as in training: sums must not depend on their number
    init_parallel(config.parallel, platform, config.train.seed)
    try:
        folder = resolve_folder(config.model.hf_model)
        policy = build_policy(read_hf_config(folder), config, platform)
        chunks: list[MegatronModule] = [Float16Module(policy.config, policy) if policy.config.bf16 else policy]
        found = []
        engine = embedded_engine(chunks, config.engine)
        with closing(engine):
            for version, checkpoint in enumerate(checkpoints):
                if checkpoint is not None:
                    load_weights(chunks, checkpoint)
                elif config.model.init == "pretrained":
                    load_hf_weights(chunks, folder)
                name = weights_name(config, checkpoint)
                engine.load(chunks, version)
                found.append(converse(engine, functools.partial(ask, checkpoint, name, engine.generate)))
        return found
    finally:
        shutdown()


def _check_layout(config: Config) -> None:
    ranks, stages = int(os.environ.get("WORLD_SIZE", "1")), config.parallel.pipeline_model_parallel_size
    faults = list(world_is_divided(config, ranks))
    if stages > 1:
        faults.append(
            f"parallel.pipeline_model_parallel_size is {stages}; only whole models sample, so it must be 1 here."
        )
    if faults:
        raise LayoutError(
            "\n".join([*faults, "An evaluation needs no layout of the training's: set another behind `--`."])
        )


def weights_name(config: Config, checkpoint: Path | None) -> str:
    """A name that equal weights share whatever the layout: of the files that they are read from, by content.

    Raises:
        CheckpointError: the checkpoint has no manifest.
    """
    folder = resolve_folder(config.model.hf_model)
    digest = hashlib.blake2b(config.model.params_dtype.encode(), digest_size=8)
    if checkpoint is not None:
        try:
            digest.update((checkpoint / MANIFEST).read_bytes())  # it holds a checksum of every file
        except OSError as error:
            raise CheckpointError(f"{checkpoint} has no {MANIFEST}: it is no checkpoint of ours.") from error
    else:
        digest.update((folder / "config.json").read_bytes())
        if config.model.init == "random":
            digest.update(f"random {config.train.seed}".encode())
        else:
            for file in sorted(folder.glob("*.safetensors")):
                digest.update(of_file(file, "sha256").removeprefix("sha256:").encode())
    return digest.hexdigest()
