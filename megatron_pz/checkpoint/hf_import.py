"""Weights of a Hugging Face folder into the model chunks of this rank: each rank reads only what it holds a piece of.

The names in the folder are compared with those of the whole model, on every rank alike, before anything is read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_pz.errors import ModelError
from megatron_pz.models.folder import resolve_folder
from megatron_pz.models.shards import shards_of, unwrap

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_NAMES = 12  # told of each fault


def load_hf_weights(chunks: Sequence[torch.nn.Module], folder: str | Path) -> None:
    """Fill the chunks with the weights of `folder`, cast to the parameters' dtype.

    An optimizer with float32 copies of the parameters must be made after this.

    Raises:
        ModelError: there are no weights, or tensors are missing, left over, unreadable or of another shape; all that
            are seen are named at once.
    """
    path = resolve_folder(folder)
    reader = TensorReader(path)
    policy = unwrap(chunks[0])
    reader.check_names(policy.family.hf_names(policy.hf_config))
    misshaped = []
    for shard in shards_of(chunks):
        try:
            shard.fill(reader.read)
        except ModelError as error:
            misshaped.append(str(error).rstrip("."))
    if misshaped:
        raise ModelError(f"{path}: the weights do not fit config.json; {'; '.join(misshaped[:MAX_NAMES])}.")


class TensorReader:
    """Tensors by name out of a folder of safetensors, one file or several with an index.

    Raises:
        ModelError: there are none, the index is broken or names a file that is not there, or a file cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[Path, Any] = {}
        self._file_of = self._files(folder)

    @property
    def names(self) -> set[str]:
        """Of every tensor."""
        return set(self._file_of)

    def check_names(self, wanted: Sequence[str]) -> None:
        """Pass if the tensors are those of `wanted`.

        Raises:
            ModelError: some are missing or left over; all are named.
        """
        known = set(wanted)
        missing, unknown = known - self.names, {name for name in self.names - known if not _is_spare(name, known)}
        faults = [f"{kind} {_told(names)}" for kind, names in (("missing", missing), ("left over", unknown)) if names]
        if faults:
            raise ModelError(f"{self.folder}: the weights do not fit config.json; {'; '.join(faults)}.")

    def file_of(self, name: str) -> Path:
        """Where a tensor stands."""
        return self._file_of[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor; its numbers are not read."""
        return tuple(self._handle(self._file_of[name]).get_slice(name).get_shape())

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor, [*shape(name)] in the dtype of the file, on the CPU."""
        path = self._file_of[name]
        try:
            return self._handle(path).get_tensor(name)
        except SafetensorError as error:
            raise ModelError(f"{path}: tensor {name} cannot be read: {error}.") from error

    def _files(self, folder: Path) -> dict[str, Path]:
        if (folder / INDEX).is_file():
            try:
                files = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            except (json.JSONDecodeError, KeyError) as error:
                raise ModelError(f"{folder / INDEX} is no index of safetensors: {error!r}.") from error
            absent = {file for file in files.values() if not (folder / file).is_file()}
            if absent:
                raise ModelError(f"{folder} lacks {_told(absent)}, which its index names; fetch the folder again.")
            return {name: folder / file for name, file in files.items()}
        if not (folder / SINGLE).is_file():
            raise ModelError(
                f'{folder} has neither {SINGLE} nor {INDEX}; to start from random weights set --init "random".'
            )
        return dict.fromkeys(self._handle(folder / SINGLE).keys(), folder / SINGLE)

    def _handle(self, path: Path) -> Any:
        # Kept open: a header lists thousands of experts, and there are as many reads.
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path} cannot be read: {error}; fetch the folder again.") from error
        return self._open[path]


def _is_spare(name: str, wanted: set[str]) -> bool:
    """Whether a tensor can be left out: a tied head's copy of the embedding, or a table of rotary frequencies."""
    return (name == "lm_head.weight" and "lm_head.weight" not in wanted) or name.endswith("rotary_emb.inv_freq")


def _told(names: set[str]) -> str:
    """Names in order, the first few of many."""
    first, rest = sorted(names)[:MAX_NAMES], len(names) - MAX_NAMES
    return ", ".join(first) + (f" and {rest} more" if rest > 0 else "")
