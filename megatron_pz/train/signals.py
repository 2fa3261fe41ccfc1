"""Signals that ask a run to stop: it finishes its step, saves, and ends well. All ranks agree on the step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignals:
    """Within the block SIGTERM, SIGUSR1 and the first SIGINT are noted; a second SIGINT interrupts as usual.

    Args:
        group: gloo group of all ranks; None with one process.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self._caught: int = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in STOPPING}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._caught = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._before[signal.SIGINT])

    def agreed(self) -> str:
        """Name of a signal that some rank has caught, the same on every rank; empty if none has. Collective."""
        caught = self._caught
        if self._group is not None:
            box = torch.tensor([caught])
            dist.all_reduce(box, dist.ReduceOp.MAX, group=self._group)
            caught = int(box.item())
        return signal.Signals(caught).name if caught else ""


@contextmanager
def unheard() -> Iterator[None]:
    """Within the block the signals wait, for this thread until its end and for processes that it starts for ever.

    Those that write a checkpoint would end by a signal that Slurm, torchrun or a terminal sends to all processes of a run, just
    when the run wants to save.
    """
    resource_tracker.ensure_running()  # when it starts it lets SIGTERM and SIGINT through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
