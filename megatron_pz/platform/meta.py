"""Tensors of shapes without numbers: a model of any size is built in no memory, to be counted or described."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_pz.platform.cpu import CpuPlatform

META = torch.device("meta")


class MetaPlatform(CpuPlatform):
    """The local layers on the meta device. Transformer Engine's have the same weights. Build within `on_meta`."""

    @property
    def device(self) -> torch.device:
        """Where tensors have shapes only."""
        return META

    def transformer_defaults(self, transformer_impl: str | None = None) -> dict[str, Any]:
        """The CPU's, without initialisation."""
        no_numbers = {"use_cpu_initialization": False, "perform_initialization": False}
        return {**super().transformer_defaults(), **no_numbers}


class _AnyDeviceIsMeta(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = META
        return function(*args, **kwargs)


@contextmanager
def on_meta() -> Iterator[None]:
    """Tensors that are made here have shapes only, also those that ask for a device by name."""
    with META, _AnyDeviceIsMeta():
        yield
