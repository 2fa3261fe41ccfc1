"""Requests shared out over servers, of which any may be lost at any time. Lives in one event loop.

1. A request goes to the live server with the fewest requests under way, or to the router where there is one.
2. Only faults of the connection are tried again, with growing pauses; what a server refuses is an error at once.
3. After a fault the server is examined. One that does not answer, or answers but does not generate, is lost: `on_lost`
   brings it back (it gets its weights then), and its requests wait for any live server.
4. A response that the server gave up (a pause in mode `abort`) is asked for again. Each request has one answer.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from megatron_pz.engine.sglang.client import Client
from megatron_pz.engine.sglang.faults import ServerBusy, ServerLost
from megatron_pz.errors import EngineError
from megatron_pz.types import Completion, SamplingParams

MAX_TRIES = 8
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
MAX_EXAMINATIONS = 10
"""Times `request_timeout_s` that a request may take on a server that is otherwise well."""


@dataclass
class Counters:
    """Since the beginning."""

    requests: int = 0
    retries: int = 0
    aborted: int = 0  # responses given up by a server, asked for again
    lost: int = 0  # times that a server was lost


class Pool:
    """`types.Generate` over `clients`.

    Args:
        max_running_requests: under way at one time, over all servers.
        request_timeout_s: after so long without an answer the server is examined.
        router: in front of the servers; they are still spoken to directly for everything but requests.
    """

    def __init__(
        self,
        clients: Sequence[Client],
        max_running_requests: int,
        request_timeout_s: float,
        router: Client | None = None,
    ) -> None:
        self.clients, self.router, self.request_timeout_s = list(clients), router, request_timeout_s
        self.on_lost: Callable[[int], Awaitable[None]] | None = None
        self.counters = Counters()
        self.is_paused = False  # set while weights arrive: then nothing that is asked is answered, and nothing is wrong
        self.in_flight = [0] * len(clients)
        self._slots = asyncio.Semaphore(max_running_requests)
        self._returning: dict[int, asyncio.Task[None]] = {}
        self._gone: dict[int, Exception] = {}  # servers that could not be brought back
        self._examined: dict[int, asyncio.Task[None]] = {}
        self._aborts: set[asyncio.Task[None]] = set()
        self._change = asyncio.Event()

    def live(self) -> list[int]:
        """Servers that may be asked."""
        return [index for index in range(len(self.clients)) if index not in self._returning and index not in self._gone]

    async def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        """One sampled response; see `types.Generate`.

        Raises:
            EngineError: the request is out of range, was refused, or failed too often.
        """
        self.clients[0].check(prompt_ids, params)
        async with self._slots:
            self.counters.requests += 1
            pause = FIRST_PAUSE_S
            fault: EngineError | None = None
            for attempt in range(MAX_TRIES):
                if attempt:
                    self.counters.retries += 1
                    await asyncio.sleep(pause * random.uniform(0.5, 1.0))
                    pause = min(2 * pause, LONGEST_PAUSE_S)
                server = await self._choose()
                try:
                    while (found := await self._ask(server, prompt_ids, params)).finish_reason == "abort":
                        self.counters.aborted += 1
                    return found
                except ServerBusy as busy:
                    fault = busy
                except ServerLost as lost:
                    fault = lost
                    await self._examine(server)
        raise EngineError(
            f"A request failed {MAX_TRIES} times, with pauses in between. The last time: {fault}"
        ) from fault

    async def mark_lost(self, server: int) -> None:
        """Ask nothing of `server` until it is back."""
        if server in self._returning or server in self._gone:
            return
        assert self.on_lost is not None
        self.counters.lost += 1
        self._returning[server] = asyncio.ensure_future(self._return(server))

    async def close(self) -> None:
        """Give up what is under way and close the connections."""
        tasks = [*self._returning.values(), *self._examined.values(), *self._aborts]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for client in [*self.clients, *([self.router] if self.router else [])]:
            await client.close()

    async def _choose(self) -> int:
        """The live server with the fewest requests under way; waits until there is one."""
        while not (live := self.live()):
            if not self._returning:
                raise next(iter(self._gone.values()))
            self._change.clear()
            await self._change.wait()
        return min(live, key=self.in_flight.__getitem__)

    async def _ask(self, server: int, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        client, rid = self.router or self.clients[server], uuid.uuid4().hex
        self.in_flight[server] += 1
        asked = asyncio.ensure_future(client.generate(rid, prompt_ids, params))
        try:
            for _ in range(MAX_EXAMINATIONS):
                done, _pending = await asyncio.wait({asked}, timeout=self.request_timeout_s)
                if done:
                    return asked.result()
                if not self.is_paused and not await self.clients[server].can_generate():
                    break
            raise ServerLost(
                f"The SGLang server at {client.url} has not answered a request for {self.request_timeout_s:g} s, "
                "or many times that although it answers others."
            )
        finally:
            self.in_flight[server] -= 1
            if not asked.done():
                asked.cancel()
                self._abort(client, rid)

    def _abort(self, client: Client, rid: str) -> None:
        async def abort() -> None:
            with suppress(EngineError):
                await client.abort(rid)

        task = asyncio.ensure_future(abort())
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)

    async def _examine(self, server: int) -> None:
        """Find out whether a server with which something went wrong is lost; once for all that ask at the same time.

        Behind a router it may be any of them.
        """
        suspects = self.live() if self.router else [server]
        for suspect in suspects:
            if suspect not in self._examined:
                task = asyncio.ensure_future(self._mark_if_lost(suspect))
                self._examined[suspect] = task
                task.add_done_callback(lambda _, suspect=suspect: self._examined.pop(suspect, None))  # type: ignore[misc]
            await asyncio.shield(self._examined[suspect])

    async def _mark_if_lost(self, server: int) -> None:
        client = self.clients[server]
        if not await client.is_up() or not (self.is_paused or await client.can_generate()):
            await self.mark_lost(server)

    async def _return(self, server: int) -> None:
        assert self.on_lost is not None
        try:
            await self.on_lost(server)
        except Exception as error:  # noqa: BLE001 - told to those who wait, once no server is left
            self._gone[server] = error
        finally:
            del self._returning[server]
            self._change.set()
