"""Parameters that Transformer Engine keeps in FP8 (`model.fp8_param_gather`): read as plain numbers, filled with their masters.

They are tensors of its own classes, which say `dequantize` and take `copy_`. Where they are made, the number before rounding
is kept beside (`get_high_precision_init_val`), and the optimizer starts its float32 master from that: whoever fills such a
parameter later must fill both, or the first update would bring the random weights back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def plain(parameter: Tensor) -> Tensor:
    """The parameter's numbers as an ordinary tensor [...] of the dtype that it passes for, without gradient."""
    # Every tensor has `dequantize`; only those of a class of their own need it.
    is_plain = type(parameter) in (Tensor, torch.nn.Parameter)
    return parameter.detach() if is_plain else parameter.dequantize().detach()


@torch.no_grad()
def fill(parameter: Tensor, values: Tensor) -> None:
    """Set the parameter, and what the optimizer's master will be made of; `values` are [...] as it, of any floating dtype."""
    parameter.copy_(values)
    unrounded: Any = getattr(parameter, "get_high_precision_init_val", None)
    kept = None if unrounded is None else unrounded()
    if kept is not None:
        kept.copy_(values)
