"""One background thread with an event loop of its own, in which all talk with servers happens, for the whole run."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class IoThread:
    """Runs coroutines while the main thread does something else.

        io = IoThread()
        io.run(control.flush_cache())            # wait here
        future = io.submit(conversation())       # go on, and ask for future.result() later
        io.close()

    An error arrives as itself; Ctrl-C in the main thread ends its wait and cancels what it waited for.
    """

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop, name="server talk", daemon=True)
        self._thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start `coroutine` in the thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Result of `coroutine`; not from within the thread."""
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError(
                "IoThread.run was called from its own thread, which would wait for itself; await instead."
            )
        future = self.submit(coroutine)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Cancel what is under way and end the thread. May be called twice."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()

    def _loop(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
            while tasks := asyncio.all_tasks(self.loop):  # one that is cancelled may begin others
                for task in tasks:
                    task.cancel()
                self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        finally:
            self.loop.close()
