"""How a tensor in GPU memory is named to another process, which may count the GPUs otherwise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import reductions

DEVICE = 6
"""Which argument of torch's `rebuild_cuda_tensor` is the device's number.

Source: torch.multiprocessing.reductions; SGLang's `srt/utils/patch_torch.py` relies on the same place."""


def reduced(tensor: Tensor) -> tuple[Any, ...]:
    """Torch's recipe of the tensor, [...] of any dtype, for a pickle; a GPU stands in it by its UUID instead of its number.

    A server is started with its own GPUs visible only, so that our GPU 3 is its GPU 0. SGLang reads both.
    """
    recipe: tuple[Any, ...] = reductions.reduce_tensor(tensor)
    rebuild, arguments = recipe[:2]
    if rebuild is not reductions.rebuild_cuda_tensor:
        return recipe
    uuid = str(torch.cuda.get_device_properties(arguments[DEVICE]).uuid)
    return rebuild, (*arguments[:DEVICE], uuid, *arguments[DEVICE + 1 :])
