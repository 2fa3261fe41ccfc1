"""Hugging Face folder to Megatron checkpoint and back, a parameter at a time: no GPU, no ranks, little memory.

A converted checkpoint is one of the trainer's without optimizer (`--load`), and loads under any layout:

    DST/shards/*.distcp .metadata ...   the pieces
    DST/hf/                             config.json and tokenizer, for the way back
    DST/manifest.json                   every file with its checksum
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError

from megatron_pz.checkpoint.counterparts import (
    FP8,
    VOCABULARY_DIVISOR,
    encoder,
    pieces,
    spec_bytes,
    specs_of,
    written,
)
from megatron_pz.checkpoint.digested import DigestedFile
from megatron_pz.checkpoint.hf_export import copy_settings, write_config
from megatron_pz.checkpoint.hf_import import INDEX, SINGLE, TensorReader
from megatron_pz.checkpoint.manifest import fingerprint, write_manifest
from megatron_pz.checkpoint.pieces import PieceReader, write_index, write_object, write_piece
from megatron_pz.checkpoint.skeleton import Parameter, Skeleton, skeleton
from megatron_pz.checkpoint.store import SHARDS
from megatron_pz.checkpoint.tensor_file import MappedTensors, TensorFile
from megatron_pz.checkpoint.unfinished import UnfinishedFolder
from megatron_pz.config.fp8 import QUANTIZATION_CONFIG
from megatron_pz.errors import CheckpointError, DiskError, MegatronPZError, ModelError
from megatron_pz.models.folder import read_hf_config

HF = "hf"
GIB = 1024**3
Broken = TypeVar("Broken", DigestedFile, TensorFile)

Advance = Callable[[int], None]
"""Told the bytes that were done."""


def to_megatron(
    source: Path,
    destination: Path,
    *,
    dtype: torch.dtype | None = None,
    advance: Advance = lambda _: None,
    max_file_bytes: int = 2 * GIB,
) -> None:
    """Write the checkpoint `destination` of the weights in the Hugging Face folder `source`.

    Args:
        dtype: of the tensors written; None: as they are.
        max_file_bytes: a further file is begun before one grows larger; a single parameter always fits.

    Raises:
        ModelError: tensors are missing, left over, of another shape or cannot be read.
        DiskError: `destination` exists, or there is no room. What is whole is kept for the next attempt.
    """
    hf_config, reader = read_hf_config(source), TensorReader(source)
    model = skeleton(hf_config, VOCABULARY_DIVISOR)
    _check_source(reader, model)
    task = {"source": str(source.resolve()), "files": _stamps(source), "dtype": str(dtype), "split": max_file_bytes}
    output = UnfinishedFolder(destination, {"to": "megatron", **task})
    (output.folder / SHARDS).mkdir(exist_ok=True)
    tensors, first = MappedTensors(reader), dtype or _first_dtype(reader, model)
    groups = _groups(model.parameters, lambda one: _hf_bytes(one, first), max_file_bytes)
    with closing(output), _told_disk(destination):
        for number, group in enumerate(groups):
            name = f"{SHARDS}/__0_{number}.distcp"
            if number < len(output.files):
                advance(output.files[number].bytes)
                continue
            with _closed_if_broken(DigestedFile(output.folder / name)) as file:
                facts = [write_object(file, key) for key in model.objects] if number == 0 else []
                for parameter in group:
                    for place, piece in pieces(parameter, tensors, dtype):
                        facts.append(write_piece(file, place, piece))
                        advance(piece.nbytes)
            output.add(name, file.finish, facts)
        files = output.settle()
        write_index(output.folder / SHARDS, {Path(file.name).name: file.holds for file in files})
        copy_settings(source, output.folder / HF)
        shutil.copyfile(source / "config.json", output.folder / HF / "config.json")
        facts_of_all = {
            "step": 0,
            "model": fingerprint(hf_config),
            "layout": {"world_size": 1},
            "versions": {name: version(name) for name in ("megatron-core", "torch")},
        }
        known = {file.name: file.checksum for file in files}
        output.finish(lambda: write_manifest(output.folder, facts_of_all, known))


def to_hf(
    source: Path,
    destination: Path,
    hf_dir: Path,
    *,
    dtype: torch.dtype | str | None = None,
    advance: Advance = lambda _: None,
    max_file_bytes: int = 5 * GIB,
) -> None:
    """Write the Hugging Face folder `destination` of the weights in the checkpoint `source`, saved under any layout.

    Args:
        hf_dir: folder with config.json and tokenizer; see `hf_folder_of`.
        dtype: of the tensors written; None: as they are; FP8: quantised by blocks.

    Raises:
        CheckpointError: parameters are missing, left over, of another shape or damaged.
        DiskError: as `to_megatron`.
    """
    model = skeleton(read_hf_config(hf_dir), VOCABULARY_DIVISOR)
    reader = PieceReader(source / SHARDS)
    _check_checkpoint(source, reader, model)
    encode = encoder(dtype)
    task = {"source": str(source.resolve()), "files": _stamps(source / SHARDS), "dtype": str(dtype)}
    output = UnfinishedFolder(destination, {"to": HF, **task, "split": max_file_bytes})
    specs = {id(one): specs_of(one, reader, encode) for one in model.parameters}
    groups = _groups(model.parameters, lambda one: spec_bytes(specs[id(one)]), max_file_bytes)
    weight_map: dict[str, str] = {}
    total = 0
    with closing(output), _told_disk(destination):
        for number, group in enumerate(groups):
            name = SINGLE if len(groups) == 1 else f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
            wanted = [spec for one in group for spec in specs[id(one)]]
            weight_map |= {spec[0]: name for spec in wanted}
            total += spec_bytes(wanted)
            if number < len(output.files):
                advance(output.files[number].bytes)
                continue
            with _closed_if_broken(TensorFile(output.folder / name, wanted)) as file:
                for parameter in group:
                    for key, tensor in written(parameter, reader, encode):
                        file.add(key, tensor)
                        advance(tensor.nbytes)
            output.add(name, file.finish, None)
        output.settle()
        copy_settings(hf_dir, output.folder)
        first = next(iter(specs[id(model.parameters[0])]))[1]
        extra = {"quantization_config": QUANTIZATION_CONFIG} if dtype == FP8 else {}
        write_config(hf_dir, output.folder, first, extra)
        if len(groups) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (output.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        output.finish()


def hf_folder_of(checkpoint: Path) -> Path:
    """Where config.json and tokenizer of `checkpoint` are: its own, or the model that its run began with.

    Raises:
        CheckpointError: neither is there.
    """
    import tomllib

    if (checkpoint / HF / "config.json").is_file():
        return checkpoint / HF
    settings = checkpoint.parent.parent / "config.toml"
    try:
        folder = Path(tomllib.loads(settings.read_text(encoding="utf-8"))["model"]["hf_model"])
    except (OSError, KeyError, tomllib.TOMLDecodeError) as error:
        raise CheckpointError(
            f"{checkpoint} does not say which model it is of: it has no {HF}/config.json, and {settings} names none "
            f"({error}). Give --hf-model FOLDER, with config.json and the tokenizer."
        ) from error
    return folder


def source_bytes(folder: Path) -> int:
    """Of the tensors in `folder`, for a progress bar."""
    return sum(path.stat().st_size for path in [*folder.glob("*.safetensors"), *folder.glob(f"{SHARDS}/*.distcp")])


def _check_source(reader: TensorReader, model: Skeleton) -> None:
    """Names and shapes, before anything is written."""
    reader.check_names(model.hf_names())
    faults = []
    for one in model.parameters:
        for name, wanted in zip(one.shard.hf_names, one.shard.hf_shapes(), strict=True):
            if (found := reader.shape(name)) != wanted:
                faults.append(f"{name} has shape {found}, config.json makes it {wanted}")
    if faults:
        raise ModelError(f"{reader.folder}: the weights do not fit config.json; {'; '.join(faults[:12])}.")


def _check_checkpoint(source: Path, reader: PieceReader, model: Skeleton) -> None:
    wanted = {place.key for one in model.parameters for place in one.places()}
    found = {key for key in reader.tensor_keys() if not key.startswith(("optimizer.", "chained_"))}
    faults = [
        f"{kind} {', '.join(sorted(keys)[:12])}{f' and {len(keys) - 12} more' if len(keys) > 12 else ''}"
        for kind, keys in (("missing", wanted - found), ("left over", found - wanted))
        if keys
    ]
    if faults:
        raise CheckpointError(f"{source}: the parameters do not fit config.json; {'; '.join(faults)}.")


def _hf_bytes(parameter: Parameter, dtype: torch.dtype) -> int:
    return parameter.shard.parameter.numel() * dtype.itemsize


def _first_dtype(reader: TensorReader, model: Skeleton) -> torch.dtype:
    return reader.read(min(model.hf_names(), key=lambda name: ("norm" not in name, name))).dtype


def _groups(
    parameters: Sequence[Parameter], size_of: Callable[[Parameter], int], max_bytes: int
) -> list[list[Parameter]]:
    """Consecutive parameters that share a file."""
    groups: list[list[Parameter]] = []
    held = 0
    for one in parameters:
        if not groups or held + size_of(one) > max_bytes:
            groups.append([])
            held = 0
        groups[-1].append(one)
        held += size_of(one)
    return groups


def _stamps(folder: Path) -> list[list[Any]]:
    """What tells whether the source is still the same: names, sizes, times."""
    paths = sorted([*folder.glob("*.safetensors"), *folder.glob("*.distcp"), *folder.glob("config.json")])
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]


@contextmanager
def _closed_if_broken(file: Broken) -> Iterator[Broken]:
    """`file`, open if all went well."""
    try:
        yield file
    except BaseException:
        file.close()
        raise


class _told_disk:
    """A full disk is told as such; what is whole stays."""

    def __init__(self, destination: Path) -> None:
        self._destination = destination

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, MegatronPZError):
            return
        if isinstance(error, (OSError, SafetensorError)) or (
            isinstance(error, RuntimeError) and "PytorchStreamWriter" in str(error)
        ):
            raise DiskError(
                f"{self._destination} could not be written: {error}. The files that are whole are kept: free some room and "
                "start the same command again."
            ) from error
