"""Whether a conversion's output is, bit for bit, what its source makes it: both are read again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from megatron_pz.checkpoint.counterparts import VOCABULARY_DIVISOR, encoder, from_hf, joined, written
from megatron_pz.checkpoint.digested import BLOCK, WRITERS
from megatron_pz.checkpoint.pieces import PieceReader
from megatron_pz.checkpoint.skeleton import Parameter, skeleton
from megatron_pz.checkpoint.store import SHARDS
from megatron_pz.checkpoint.tensor_file import MappedTensors, TensorReader
from megatron_pz.models.folder import read_hf_config
from megatron_pz.platform.host import give_back_memory

Pair = tuple[str, Tensor, Tensor]
"""Name of a Hugging Face tensor, what the source makes it or of it, and what the output has."""


def differences(
    hf_dir: Path,
    checkpoint: Path,
    *,
    dtype: torch.dtype | str | None = None,
    is_source_hf: bool,
    advance: Callable[[int], None] = lambda _: None,
) -> list[str]:
    """Names of the tensors in which the output is not, bit for bit, what the source makes it.

    Args:
        dtype: that the output was asked for.
        is_source_hf: whether `checkpoint` was made of `hf_dir`; otherwise it is the other way round.
        advance: told the bytes that were compared.
    """
    model = skeleton(read_hf_config(hf_dir), VOCABULARY_DIVISOR)
    tensors, pieces = MappedTensors(TensorReader(hf_dir)), PieceReader(checkpoint / SHARDS)
    found = []
    with ThreadPoolExecutor(WRITERS) as pool:
        for one in model.parameters:
            if is_source_hf:
                assert not isinstance(dtype, str)
                pairs = _in_checkpoint(one, tensors, pieces, dtype)
            else:
                pairs = ((name, value, tensors.read(name)) for name, value in written(one, pieces, encoder(dtype)))
            for name, wanted, there_is in pairs:
                if not _is_same(wanted, there_is, pool):
                    found.append(name)
                advance(there_is.nbytes)
            if not one.is_saved_as_hf or dtype is not None:  # it was put together, in fresh memory
                give_back_memory()
    return found


def _in_checkpoint(
    parameter: Parameter, tensors: MappedTensors, pieces: PieceReader, dtype: torch.dtype | None
) -> Iterator[Pair]:
    """A parameter made of the folder, and as the checkpoint has it."""
    if not parameter.is_saved_as_hf:
        yield parameter.shard.hf_names[0], from_hf(parameter, tensors, dtype), joined(parameter, pieces)
        return
    for place, name in zip(parameter.places(), parameter.shard.hf_names, strict=True):
        value = tensors.read(name)
        yield name, value if dtype is None else value.to(dtype), pieces.read(place).reshape(value.shape)


def _is_same(a: Tensor, b: Tensor, pool: ThreadPoolExecutor) -> bool:
    """Bit for bit: NaN equals itself, and zero is not minus zero."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    # Of integers as wide as there are: torch compares them one by one.
    kind = torch.int64 if a.nbytes % torch.int64.itemsize == 0 else torch.uint8
    blocks = [one.contiguous().reshape(-1).view(kind).split(BLOCK // kind.itemsize) for one in (a, b)]
    return all(pool.map(torch.equal, *blocks))
