"""Warnings of Megatron-Core and torch that speak of their own code, and that no user of this package can act on.

Each is named by its words and by the module that raises it: the same words from elsewhere are still shown.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Harmless:
    """One warning that is not shown."""

    message: str  # regular expression, from the message's start
    module: str  # regular expression, from the start of the name of the module that raises it
    category: type[Warning]
    reason: str


EVERYWHERE = (
    Harmless(
        r"full scope is deprecated",
        r"megatron\.core\.transformer",
        UserWarning,
        "the default that TransformerConfig gives cuda_graph_scope itself",
    ),
    Harmless(
        r"`sequence_parallel` is set to `True`, but tensor model parallel size is 1",
        r"megatron\.core\.tensor_parallel",
        UserWarning,
        "experts that each lie on one rank, in a model whose other weights do not",
    ),
    Harmless(
        r"The \.grad attribute of a Tensor that is not a leaf",
        r"megatron\.core\.optimizer",
        UserWarning,
        "the optimizer asks every parameter for either of two kinds of gradient",
    ),
    Harmless(
        r"`torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated",
        r"torch\.distributed",
        FutureWarning,
        "the distributed optimizer's collectives, by the names of older versions of torch",
    ),
    Harmless(
        r"`load_state_dict` is deprecated",
        r"megatron\.core\.dist_checkpointing",
        FutureWarning,
        "loading a checkpoint",
    ),
    Harmless(
        r"Please use DTensor instead and we are deprecating ShardedTensor",
        r"torch\.distributed",
        FutureWarning,
        "the kind of tensor that megatron.core.dist_checkpointing saves",
    ),
)
ON_A_CPU = (
    Harmless(
        r"When using sequence parallelism it is recommended to set the environment variable CUDA_DEVICE_MAX_CONNECTIONS",
        r"megatron\.core\.tensor_parallel",
        UserWarning,
        "there is no CUDA device to have connections to",
    ),
)


def silence(found: tuple[Harmless, ...]) -> None:
    """Show `found` no more in this process. All other warnings are as before."""
    for one in found:
        warnings.filterwarnings("ignore", message=one.message, category=one.category, module=one.module)
