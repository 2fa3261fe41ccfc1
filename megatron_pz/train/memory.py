"""Who has the accelerator's memory: the engine while it plays, the trainer while it learns, or each its own always.

play: weights + KV cache of the servers | policy weights          -> to_trainer()
learn: policy weights + gradients + optimizer state               -> to_engine(), then the weights are handed over
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from megatron_pz.platform.base import Platform


class Memory(Protocol):
    def to_trainer(self) -> None:
        """Play is over."""
        ...

    def to_engine(self) -> None:
        """The update is done; the engine's weights come next."""
        ...

    def lap(self) -> dict[str, float]:
        """Metrics of the phases since the last lap."""
        ...


class OwnMemory:
    """Engine and trainer have memory of their own, or take turns by nature (the embedded engine)."""

    def to_trainer(self) -> None:
        """Nothing moves."""

    def to_engine(self) -> None:
        """Nothing moves."""

    def lap(self) -> dict[str, float]:
        """Nothing to tell."""
        return {}


class SharedMemory:
    """Servers on the trainer's own accelerators (`sglang.colocate`). Begins with the engine's turn.

    Args:
        engine_sleeps, engine_wakes: the servers release and resume their memory.
        trainer_sleeps, trainer_wakes: gradients and optimizer state leave the accelerator and come back.
        platform: measures.
    """

    def __init__(
        self,
        engine_sleeps: Callable[[], None],
        engine_wakes: Callable[[], None],
        trainer_sleeps: Callable[[], None],
        trainer_wakes: Callable[[], None],
        platform: Platform,
    ) -> None:
        self._engine_sleeps, self._engine_wakes = engine_sleeps, engine_wakes
        self._trainer_sleeps, self._trainer_wakes = trainer_sleeps, trainer_wakes
        self._platform = platform
        self._bytes: dict[str, float] = {}
        self._trainer_sleeps()

    def to_trainer(self) -> None:
        self._measure("memory/trainer_asleep_bytes")
        self._engine_sleeps()
        self._trainer_wakes()

    def to_engine(self) -> None:
        self._measure("memory/trainer_awake_bytes")
        self._trainer_sleeps()
        self._engine_wakes()

    def lap(self) -> dict[str, float]:
        found, self._bytes = self._bytes, {}
        return found

    def _measure(self, name: str) -> None:
        self._platform.synchronize()
        self._bytes[name] = float(self._platform.memory_bytes()["allocated"])
