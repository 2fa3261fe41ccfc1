"""CPU-seconds of named functions, by the clock of the thread that runs them; what one calls of another is the other's.

For benchmarks: functions are wrapped in this process only, and each call takes about a microsecond more.
"""

from __future__ import annotations

import functools
import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any


class Parts:
    """Seconds and calls of what `watch` was told of."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._local = threading.local()

    def forget(self) -> None:
        """Begin at 0."""
        self.seconds.clear()
        self.calls.clear()

    def watch(self, part: str, owner: Any, name: str) -> None:
        """Count calls of `owner.name` from now on under `part`."""
        setattr(owner, name, self.counted(part, getattr(owner, name)))

    def counted(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, counted."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            inner = getattr(self._local, "inner", 0.0)
            self._local.inner = 0.0
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.thread_time() - start
                self.seconds[part] += took - self._local.inner
                self.calls[part] += 1
                self._local.inner = inner + took

        return call


def watch_json(parts: Parts) -> None:
    """Count reading and writing of JSON by thread. To be called before aiohttp is imported, which keeps `json.dumps`."""
    dumps, loads = json.dumps, json.loads
    by_thread: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}

    def own() -> tuple[Callable[..., Any], Callable[..., Any]]:
        name = threading.current_thread().name
        if name not in by_thread:
            by_thread[name] = parts.counted(f"JSON out, {name}", dumps), parts.counted(f"JSON in, {name}", loads)
        return by_thread[name]

    json.dumps = lambda *args, **kwargs: own()[0](*args, **kwargs)
    json.loads = lambda *args, **kwargs: own()[1](*args, **kwargs)
