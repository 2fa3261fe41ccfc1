"""Seconds by named phase, on a clock that never goes back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Timers:
    """Adds up the seconds of named phases between two records.

        timers = Timers()
        with timers("rollout"): ...
        with timers("train"): ...
        timers.lap()   # {"time/rollout_s": 1.9, "time/train_s": 3.1, "time/step_s": 5.0}

    A phase entered twice adds up. A phase inside another is taken out of the outer one, so that phases never add up to
    more than `time/step_s`. A phase left by an exception counts too.

    Args:
        clock: seconds from any start, never going back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = clock()
        self._seconds: dict[str, float] = {}
        self._open: list[tuple[str, float]] = []  # (phase, since when it runs without a phase inside it)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the body's seconds for `phase`."""
        now = self._clock()
        if self._open:
            outer, since = self._open[-1]
            self._add(outer, now - since)
        self._open.append((phase, now))
        try:
            yield
        finally:
            now = self._clock()
            name, since = self._open.pop()
            self._add(name, now - since)
            if self._open:
                self._open[-1] = (self._open[-1][0], now)

    def lap(self) -> dict[str, float]:
        """`time/<phase>_s` since the last lap, `time/step_s` in all; then begin the next lap.

        A phase that is open goes on in the next lap, where what is left of it is counted.
        """
        now = self._clock()
        if self._open:
            phase, since = self._open[-1]
            self._add(phase, now - since)
            self._open[-1] = (phase, now)
        done = {f"time/{phase}_s": seconds for phase, seconds in self._seconds.items()}
        done["time/step_s"] = now - self._started
        self._started, self._seconds = now, {}
        return done

    def _add(self, phase: str, seconds: float) -> None:
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds
