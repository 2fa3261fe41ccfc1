"""Streams and events of CUDA on a machine where nothing runs beside Python."""

from __future__ import annotations

from typing import Any


class Stream:
    """A stream that does nothing. A class, because annotations such as `torch.cuda.Stream | None` are evaluated."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def synchronize(self) -> None:
        """Return: everything is done already."""

    def wait_stream(self, stream: Any) -> None:
        """Return: nothing runs beside this."""

    def wait_event(self, event: Any) -> None:
        """Return: the event is past."""

    def record_event(self, event: Any = None) -> Event:
        """An event that is past."""
        return event or Event()

    def query(self) -> bool:
        """True: idle."""
        return True


class Event(Stream):
    """An event that is always past."""

    def record(self, stream: Any = None) -> None:
        """Return: nothing to record."""

    def wait(self, stream: Any = None) -> None:
        """Return: the event is past."""

    def elapsed_time(self, end: Any) -> float:
        """0.0 milliseconds."""
        return 0.0
