"""Waiting for several coroutines; the first error ends them all and arrives as itself."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


async def together(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Results in the order of `coroutines`, whatever the order in which they finish.

    (`asyncio.TaskGroup` would wrap an `EngineError` in an exception group, and its message would be lost to the user.)
    """
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def joined(coroutines: Iterable[Coroutine[Any, Any, list[T]]]) -> list[T]:
    """The lists that `coroutines` make, end to end in their order."""
    return [item for part in await together(coroutines) for item in part]
