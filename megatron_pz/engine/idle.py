"""The engine of a run that asks nothing: text is learned as it is and never scored, under any layout, without a server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from megatron_pz.errors import EngineError
from megatron_pz.types import Completion, SamplingParams

T = TypeVar("T")


class IdleEngine:
    """Keeps the version of the weights, and refuses every question. See `engine.base.Engine`."""

    def __init__(self) -> None:
        self.version = -1

    async def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        """Nothing is sampled."""
        _refuse()

    def begin(self, call: Callable[[], Awaitable[T]]) -> Any:
        """Nothing is asked."""
        _refuse()

    def finish(self, begun: Any) -> Any:
        """Nothing was begun."""
        _refuse()

    def load(self, weights: Any, version: int) -> None:
        """Note the version."""
        self.version = version

    def sleep(self) -> None:
        """It holds no memory."""

    def wake(self) -> None:
        """It needs none."""

    def lap(self) -> Mapping[str, float]:
        """Nothing happened."""
        return {}

    def close(self) -> None:
        """It holds nothing."""


def _refuse() -> NoReturn:
    raise EngineError("Something is asked in a run that learns text as it is and is never scored. Set --eval-interval.")
