"""Weights of a Hugging Face folder into the model chunks of this rank: each rank reads only what it holds a piece of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megatron_pz.errors import ModelError
from megatron_pz.models.family import HfConfig
from megatron_pz.models.folder import resolve_folder
from megatron_pz.models.shards import shards_of, unwrap

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def load_hf_weights(chunks: Sequence[torch.nn.Module], folder: str | Path) -> None:
    """Fill the chunks with the weights of `folder`, cast to the parameters' dtype.

    Raises:
        ModelError: there are no weights, or a tensor is missing, left over, unreadable or of another shape; all names
            are told at once.
    """
    path = resolve_folder(folder)
    files = tensor_files(path)
    shards = shards_of(chunks)
    wanted = {name for shard in shards for name in shard.hf_names}
    missing = sorted(wanted - files.keys())
    is_whole = len(chunks) == 1 and unwrap(chunks[0]).pre_process and unwrap(chunks[0]).post_process
    unknown = sorted(files.keys() - wanted - _copies(unwrap(chunks[0]).hf_config)) if is_whole and _alone() else []
    if missing or unknown:
        faults = [
            f"{kind} {', '.join(names)}" for kind, names in (("missing", missing), ("left over", unknown)) if names
        ]
        raise ModelError(f"{path}: the weights do not fit config.json: {'; '.join(faults)}.")
    for shard in shards:
        shard.fill(lambda name: _read(files[name], name))


def tensor_files(path: Path) -> dict[str, Path]:
    """File of each tensor in a folder of safetensors, by its name.

    Raises:
        ModelError: there is none, or the index is broken.
    """
    if (path / INDEX).is_file():
        try:
            names = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
        except (json.JSONDecodeError, KeyError) as error:
            raise ModelError(f"{path / INDEX} is no index of safetensors: {error!r}.") from error
        absent = sorted({file for file in names.values() if not (path / file).is_file()})
        if absent:
            raise ModelError(f"{path} lacks {', '.join(absent)}, which its index names; fetch the folder again.")
        return {name: path / file for name, file in names.items()}
    if not (path / SINGLE).is_file():
        raise ModelError(f'{path} has neither {SINGLE} nor {INDEX}; to start from random weights set --init "random".')
    try:
        with safe_open(path / SINGLE, framework="pt") as file:
            return dict.fromkeys(file.keys(), path / SINGLE)
    except SafetensorError as error:
        raise ModelError(f"{path / SINGLE} cannot be read: {error}.") from error


def _read(path: Path, name: str) -> torch.Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except SafetensorError as error:
        raise ModelError(f"{path}: tensor {name} cannot be read: {error}.") from error


def _copies(hf_config: HfConfig) -> set[str]:
    """Tensors that repeat another one, as some folders of tied models have them."""
    return {"lm_head.weight"} if hf_config.get("tie_word_embeddings") else set()


def _alone() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1
