"""Importing torch and Megatron-Core in about half the time, for programs that start often and compute little."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import Megatron-Core within the block, and `torch` too.

    Megatron-Core decorates functions with `torch.compile`, which then imports Dynamo and Inductor: here that waits until one
    of them is called, with the same result. And nothing that is imported goes again, so the garbage collector is off.
    """
    collects = gc.isenabled()
    gc.disable()
    import torch

    stock = torch.compile
    torch.compile = functools.partial(_at_first_call, stock)
    try:
        yield
    finally:
        torch.compile = stock
        gc.freeze()
        if collects:
            gc.enable()


def _at_first_call(stock: Callable[..., Any], function: Any = None, **options: Any) -> Any:
    """What `stock(function, **options)` gives, or a decorator where no function is given."""
    if function is None:
        return lambda given: _at_first_call(stock, given, **options)
    if not isinstance(function, FunctionType):
        return stock(function, **options)

    @functools.cache
    def compiled() -> Callable[..., Any]:
        found: Callable[..., Any] = stock(function, **options)
        return found

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        import torch

        # Within another function that is being compiled, this one is a part of that.
        return (function if torch.compiler.is_compiling() else compiled())(*args, **kwargs)

    return call
