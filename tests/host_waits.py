"""What makes a host wait for its device, found on a CPU: operations whose result the host reads, or copies made of Python numbers.

Two nets: one under autograd, for operations (also those of the backward), and one at Python's surface, for methods that
leave no operation on a CPU. A wait is named by the innermost line of ours or Megatron's, or by the caller's.
"""

from __future__ import annotations

import traceback
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

OPERATIONS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "is_nonzero", "equal")
"""Of aten; beside them an index or index_put by booleans, and `repeat_interleave` by a tensor of counts."""

METHODS = ("tolist", "numpy", "cpu", "tensor")
"""By name, for the CPU platform wraps some. Device to host; and `torch.tensor` with a device, which copies from pageable memory."""


def _line() -> str:
    """`file:function` of the innermost frame that is ours or Megatron's; "fake" where a fake kernel reads what a real one need not."""
    for frame in reversed(traceback.extract_stack()[:-2]):
        path = frame.filename.replace("\\", "/")
        if "/tests/stand_in/" in path or "/tests/fake_" in path or "/site-packages/triton/" in path:
            return "fake"
        for root in ("/megatron_pz/", "/megatron/core/"):
            if root in path and "host_waits" not in path:
                return root.strip("/").split("/")[0] + "/" + path.rsplit(root, 1)[1] + ":" + frame.name
    return "elsewhere"


class _Operations(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.split("::")[-1]
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        counted = name == "repeat_interleave" and function._overloadname == "Tensor"
        if name in OPERATIONS or by_mask or counted:
            self.found.append(f"{name} in {_line()}")
        return function(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        is_of_host = name == "tensor" and (kwargs or {}).get("device") is None
        if name in METHODS and not is_of_host:
            self.found.append(f"{name} in {_line()}")
        return function(*args, **(kwargs or {}))


@contextmanager
def host_waits() -> Any:
    """A list of what the block waited for, one entry a wait."""
    found: list[str] = []
    with _Operations(found), _Methods(found):
        yield found
