"""Who has the accelerator's memory: the engine while it plays, the trainer while it learns, or each its own always.

play: weights + KV cache of the servers | policy weights          -> to_trainer()
learn: policy weights + gradients + optimizer state               -> to_engine(), then the weights are handed over
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from megatron_pz.platform.base import Platform


class Memory(Protocol):
    """Hands memory from play to update and back."""

    def to_trainer(self) -> None:
        """Play is over."""
        ...

    def to_engine(self) -> None:
        """The update is done; the engine's weights come next."""
        ...

    def lap(self) -> dict[str, float]:
        """Metrics of the phases since the last lap."""
        ...


class _Peaks:
    """The most memory that each phase of a step took, where the machine can count anew."""

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self._bytes: dict[str, float] = {}
        platform.begin_phase()

    def end(self, phase: str) -> None:
        """Note the phase that is over, and begin the next."""
        if self._platform.counts_phases:
            self._platform.synchronize()
            self._bytes[f"memory/peak_{phase}_bytes"] = float(self._platform.memory_bytes()["peak"])
            self._platform.begin_phase()

    def lap(self) -> dict[str, float]:
        """What was noted since the last lap; the phase under way is the handing over of weights."""
        self.end("sync")
        found, self._bytes = self._bytes, {}
        return found


class OwnMemory:
    """Engine and trainer have memory of their own, or take turns by nature (the embedded engine)."""

    def __init__(self, platform: Platform) -> None:
        self._peaks = _Peaks(platform)

    def to_trainer(self) -> None:
        """Nothing moves."""
        self._peaks.end("play")

    def to_engine(self) -> None:
        """Nothing moves."""
        self._peaks.end("update")

    def lap(self) -> dict[str, float]:
        """Peaks."""
        return self._peaks.lap()


class SharedMemory:
    """Servers on the trainer's own accelerators (`sglang.colocate`). Begins with the engine's turn: the trainer sleeps.

    It must sleep before the servers start, for they take what is free then.

    Args:
        engine_sleeps, engine_wakes: the servers release and resume their memory.
        trainer_sleeps, trainer_wakes: gradients and optimizer state leave the accelerator and come back.
        platform: measures, and gives freed memory back to the device.
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
        self._peaks = _Peaks(platform)

    def to_trainer(self) -> None:
        self._measure("memory/trainer_asleep_bytes")
        self._peaks.end("play")
        self._engine_sleeps()
        self._trainer_wakes()

    def to_engine(self) -> None:
        self._measure("memory/trainer_awake_bytes")
        self._trainer_sleeps()
        self._platform.release_unused()  # else torch keeps what was freed, and the servers cannot come back
        self._peaks.end("update")
        self._engine_wakes()

    def lap(self) -> dict[str, float]:
        self._platform.release_unused()  # the buckets of weights
        found, self._bytes = self._bytes, {}
        return found | self._peaks.lap()

    def _measure(self, name: str) -> None:
        self._platform.synchronize()
        self._bytes[name] = float(self._platform.memory_bytes()["allocated"])
