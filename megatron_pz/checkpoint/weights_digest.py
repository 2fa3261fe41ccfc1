"""A name for the weights of this process: equal bits, equal name, on any machine."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

_AS_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def weights_digest(chunks: Sequence[torch.nn.Module]) -> str:
    """16 hex digits over all parameters of `chunks`.

    Each tensor is named by the sum of its bit patterns as integers, which no order of summation changes. One pass over
    the weights, nothing is copied.
    """
    digest = hashlib.blake2b(digest_size=8)
    for index, chunk in enumerate(chunks):
        for name, parameter in chunk.named_parameters():
            bits = parameter.detach().contiguous().view(_AS_INTEGERS[parameter.element_size()])
            digest.update(repr((index, name, tuple(parameter.shape), int(bits.sum(dtype=torch.int64)))).encode())
    return digest.hexdigest()
