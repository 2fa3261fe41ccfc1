"""SGLang servers as an engine: rank 0 talks to them from one background thread, all ranks hand them weights.

    main thread            load ─ push ─┐        train ...         finish ── "server 1 is back: push" ── result
    background thread      conversation: generate ── generate ── a server is lost: restart ── generate ──┘

A conversation runs in the background thread, so it goes on while the main thread trains. What only all ranks together
can do, to hand weights to a server that was restarted, the background thread asks of the main thread through a mailbox,
which is read in `finish` and in `load`.
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from megatron_pz.engine.base import Conversation
from megatron_pz.engine.sglang.io_thread import IoThread
from megatron_pz.errors import EngineError
from megatron_pz.types import Completion, SamplingParams

T = TypeVar("T")

MAX_PUSHES = 3
"""Attempts to hand a version to the servers, with restarts of those that did not take it in between."""


class Servers(Protocol):
    """The servers by their index, spoken to from the background thread. `pool.Pool`, but for tests."""

    on_lost: Callable[[int], Awaitable[None]] | None

    async def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Completion: ...

    async def mark_lost(self, server: int) -> None:
        """Ask nothing of `server` until `on_lost(server)` is done."""
        ...

    def live(self) -> list[int]: ...

    def lap(self) -> Mapping[str, float]: ...

    async def close(self) -> None: ...


class Ranks(Protocol):
    """This rank among the trainer's, and what rank 0 says to all."""

    rank: int

    def broadcast(self, thing: Any) -> Any: ...


class Push(Protocol):
    """Hands the trainer's weights to servers."""

    def __call__(self, weights: Any, version: int, servers: Sequence[int]) -> Sequence[int]:
        """All ranks hand `weights` to `servers` (known on rank 0 only); those that did not take them, on rank 0."""
        ...


@dataclass(frozen=True)
class Running(Generic[T]):
    """A conversation; `future` is its result, on rank 0."""

    call: Callable[[], Awaitable[T]]
    future: Future[T] | None


class SGLangEngine:
    """`engine.base.Engine` over SGLang servers.

    Args:
        ranks: all processes of the trainer.
        push: hands weights over.
        io: the background thread; None on ranks other than 0, as are the following.
        servers: the pool.
        restart: brings a server that was lost back, without weights; raises EngineError where that fails.
        stop: ends the servers that the run has started.
        share_memory: for each of release and resume, what tells all servers; None where they have memory of their own.
    """

    def __init__(
        self,
        ranks: Ranks,
        push: Push,
        io: IoThread | None = None,
        servers: Servers | None = None,
        restart: Callable[[int], Awaitable[None]] | None = None,
        stop: Callable[[], None] = lambda: None,
        share_memory: tuple[Callable[[], Coroutine[Any, Any, None]], Callable[[], Coroutine[Any, Any, None]]]
        | None = None,
    ) -> None:
        self.ranks, self.push, self.io, self.restart, self.stop = ranks, push, io, restart, stop
        self.share_memory = share_memory
        self._servers = servers
        self._version = -1
        self._weights: Any = None
        self._mailbox: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        self._returning: dict[int, asyncio.Future[None]] = {}  # by server; touched in the background thread only
        self._under_way: set[Future[Any]] = set()
        self._is_closed = False
        if servers is not None:
            servers.on_lost = self._on_lost

    @property
    def version(self) -> int:
        """Of the weights that sample now; -1 before the first `load`."""
        return self._version

    async def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        """One sampled response; see `engine.base.Engine`. Within a conversation on rank 0."""
        assert self._servers is not None
        if self._version < 0:
            raise EngineError("The engine has no weights yet; call load(weights, version) before generate.")
        return await self._servers.generate(prompt_ids, params)

    def begin(self, call: Callable[[], Awaitable[T]]) -> Running[T]:
        """Start the conversation in the background thread of rank 0."""
        if self.io is None:
            return Running(call, None)

        async def run() -> T:
            return await call()

        future = self.io.submit(run())
        self._under_way.add(future)
        future.add_done_callback(lambda _: self._mailbox.put(None))
        return Running(call, future)

    def finish(self, begun: Conversation[T]) -> T | None:
        """Wait for the conversation; meanwhile hand weights to servers that come back."""
        assert isinstance(begun, Running)
        if begun.future is None:
            while self.ranks.broadcast(None) is not None:
                self._push([])
            return None
        try:
            while not begun.future.done():
                item = self._mailbox.get()
                if isinstance(item, int):
                    self.ranks.broadcast("push")
                    self._push([item])
        finally:
            self.ranks.broadcast(None)
        self._under_way.discard(begun.future)
        found: T = begun.future.result()
        return found

    def load(self, weights: Any, version: int) -> None:
        """Hand `weights` to every server; requests under way are paused meanwhile, and go on with them."""
        self._weights, self._version = weights, version
        self._push(self._live())

    def sleep(self) -> None:
        """Have the servers release their memory, where the trainer has the same accelerators."""
        if self.io is not None and self.share_memory is not None:
            self.io.run(self.share_memory[0]())

    def wake(self) -> None:
        """Have the servers take it back."""
        if self.io is not None and self.share_memory is not None:
            self.io.run(self.share_memory[1]())

    def lap(self) -> Mapping[str, float]:
        """Faults since the last call, and the servers that answer now."""
        return self._servers.lap() if self._servers is not None else {}

    def close(self) -> None:
        """Give up what is under way, stop the run's own servers and the background thread."""
        if self._is_closed or self.io is None or self._servers is None:
            return
        self._is_closed = True
        try:
            for future in self._under_way:
                future.cancel()
            self.io.run(self._servers.close())
        finally:
            self.stop()
            self.io.close()

    def _push(self, servers: list[int]) -> None:
        """Hand the weights to `servers`, by all ranks; those that do not take them are restarted and tried again."""
        for _ in range(MAX_PUSHES):
            broken = self.ranks.broadcast(list(self.push(self._weights, self._version, servers)))
            self._welcome([server for server in servers if server not in broken])
            if not broken:
                return
            servers = self._restarted(broken)
        raise EngineError(
            f"Weights of version {self._version} were not taken by server {', '.join(map(str, broken))} in {MAX_PUSHES} attempts, "
            "with a restart after each. Their logs, in logs/ of the run directory, say why."
        )

    def _live(self) -> list[int]:
        """Servers that can be pushed to: those that answer and those that came back; waits for the first where there is
        none. Rank 0; none elsewhere."""
        if self._servers is None:
            return []
        live = self._servers.live()
        while not self._mailbox.empty():
            item = self._mailbox.get()
            if isinstance(item, int):
                live.append(item)
        return sorted(live) or [self._next_returned()]

    def _restarted(self, servers: Sequence[int]) -> list[int]:
        """`servers`, restarted. Rank 0; none elsewhere."""
        if self.io is None or self._servers is None:
            return []
        for server in servers:
            if server in self._servers.live():
                self.io.run(self._servers.mark_lost(server))
            else:
                self.io.run(self._again(server))
        missing, others = set(servers), []
        while missing:
            server = self._next_returned()
            if server in missing:
                missing.discard(server)
            else:
                others.append(server)
        for server in others:
            self._mailbox.put(server)
        return list(servers)

    def _next_returned(self) -> int:
        while True:
            item = self._mailbox.get()
            if isinstance(item, BaseException):
                raise item
            if item is not None:
                return item

    def _welcome(self, servers: Sequence[int]) -> None:
        """Let `servers`, which have the weights now, answer again."""
        if self.io is not None:
            self.io.run(self._resolve(servers))

    async def _resolve(self, servers: Sequence[int]) -> None:
        for server in servers:
            if future := self._returning.pop(server, None):
                future.set_result(None)

    async def _on_lost(self, server: int) -> None:
        """In the background thread: bring `server` back, and wait until the main thread has given it weights."""
        self._returning[server] = asyncio.get_running_loop().create_future()
        await self._bring_back(server)
        await self._returning[server]

    async def _again(self, server: int) -> None:
        """A server that came back and did not take its weights is restarted once more, while `_on_lost` still waits."""
        returned = self._returning[server]
        task = asyncio.ensure_future(self._bring_back(server))

        def tell(done: asyncio.Task[None]) -> None:
            if (error := None if done.cancelled() else done.exception()) and not returned.done():
                returned.set_exception(error)

        task.add_done_callback(tell)
        returned.add_done_callback(lambda _: task)  # the loop itself would let go of the task

    async def _bring_back(self, server: int) -> None:
        assert self.restart is not None
        try:
            await self.restart(server)
        except Exception as error:
            self._mailbox.put(error)
            raise
        self._mailbox.put(server)
