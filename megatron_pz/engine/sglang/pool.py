"""Requests shared out over servers, of which any may be lost at any time. Lives in one event loop.

1. A request goes to the live server with the fewest requests under way, or to the router while every server is live.
2. Only faults of the connection are tried again, with growing pauses; what a server refuses is an error at once.
3. After a fault the server is examined. One that does not answer, or answers but does not generate, is lost: `on_lost`
   brings it back (it gets its weights then), and its requests are asked of any live server, or wait for one.
4. While weights arrive (`is_paused`) nothing is sent, and servers that do not generate are well.
5. A response that a server gave up (a pause in mode `abort`) is asked for again. Each request has one answer.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from megatron_pz.engine.sglang.client import Client
from megatron_pz.engine.sglang.faults import ServerBusy, ServerLost, ServerRefused
from megatron_pz.errors import EngineError
from megatron_pz.types import Completion, SamplingParams

CLOSE_TIMEOUT_S = 2.0


@dataclass(frozen=True)
class Patience:
    """When a request is given up."""

    tries: int = 8
    """In vain, with pauses in between that double from `first_pause_s` to `longest_pause_s`, less up to a half by chance."""
    first_pause_s: float = 0.1
    longest_pause_s: float = 5.0
    examinations: int = 10
    """Times `request_timeout_s` that one try may take on a server that is otherwise well."""


@dataclass
class Counters:
    """Since the beginning."""

    requests: int = 0
    tokens: int = 0  # of the responses that were handed on
    retries: int = 0  # after a fault
    aborted: int = 0  # responses given up by a server, asked for again
    lost: int = 0  # times that a server was lost


class Pool:
    """`types.Generate` over `clients`.

    Args:
        max_running_requests: under way at one time, over all servers.
        request_timeout_s: after so long without an answer the server is examined.
        router: in front of the servers; they are still spoken to directly for everything but requests.
        patience: with requests that fail.
    """

    def __init__(
        self,
        clients: Sequence[Client],
        max_running_requests: int,
        request_timeout_s: float,
        router: Client | None = None,
        patience: Patience = Patience(),
    ) -> None:
        self.clients, self.router, self.request_timeout_s = list(clients), router, request_timeout_s
        self.patience = patience
        self.on_lost: Callable[[int], Awaitable[None]] | None = None
        self.counters = Counters()
        self._last_lap = Counters()
        self.in_flight = [0] * len(clients)
        self._slots = asyncio.Semaphore(max_running_requests)
        # By the task that waits for the answer: the server (None: the router's choice) and the request's name.
        self._asked: dict[asyncio.Task[Completion], tuple[int | None, str]] = {}
        self._returning: dict[int, asyncio.Task[None]] = {}
        self._gone: dict[int, Exception] = {}  # servers that could not be brought back
        self._examined: dict[int, asyncio.Task[None]] = {}
        self._aborts: set[asyncio.Task[None]] = set()
        self._change = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_paused, self._pauses, self._is_closed = False, 0, False

    @property
    def is_paused(self) -> bool:
        """Whether weights arrive. May be set from any thread."""
        return self._is_paused

    @is_paused.setter
    def is_paused(self, is_paused: bool) -> None:
        self._pauses += is_paused
        self._is_paused = is_paused
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._change.set)

    def live(self) -> list[int]:
        """Servers that may be asked."""
        return [index for index in range(len(self.clients)) if index not in self._returning and index not in self._gone]

    def lap(self) -> Mapping[str, float]:
        """Faults since the last call, and the servers that answer now, as metrics."""
        now, before = replace(self.counters), self._last_lap
        self._last_lap = now
        return {
            "engine/retries": float(now.retries - before.retries),
            "engine/aborted": float(now.aborted - before.aborted),
            "engine/servers_lost": float(now.lost - before.lost),
            "engine/servers_live": float(len(self.live())),
        }

    async def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        """One sampled response; see `types.Generate`.

        Raises:
            EngineError: the request is out of range, was refused, or failed too often.
        """
        self._loop = asyncio.get_running_loop()
        async with self._slots:
            self.counters.requests += 1
            found = await self._persist(prompt_ids, params)
            self.counters.tokens += len(found.token_ids)
            return found

    async def mark_lost(self, server: int) -> None:
        """Ask nothing of `server` until it is back; what it was asked is asked again."""
        if server not in self.live():
            return
        self.counters.lost += 1
        self._returning[server] = asyncio.ensure_future(self._return(server))
        for task, (asked, _) in list(self._asked.items()):
            if asked == server:
                task.cancel()

    async def close(self) -> None:
        """Have the servers give up what is under way, and close the connections. What still waits gets an error."""
        self._is_closed = True
        self._change.set()
        for server, rid in self._asked.values():
            self._abort(rid, server)
        if self._aborts:
            await asyncio.wait(self._aborts, timeout=CLOSE_TIMEOUT_S)
        tasks = [*self._asked, *self._returning.values(), *self._examined.values(), *self._aborts]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for client in [*self.clients, *([self.router] if self.router else [])]:
            await client.close()

    async def _persist(self, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        """A response that no fault has spoiled."""
        tries, pause_s = 0, self.patience.first_pause_s
        fault: EngineError
        while True:
            server = await self._choose()
            pauses, losses = self._pauses, self.counters.lost
            try:
                found = await self._ask(server, prompt_ids, params)
            except ServerBusy as busy:
                fault = busy
            except ServerLost as lost:
                fault = lost
                if not self._is_closed:
                    await self._examine(server)
            except ServerRefused as refused:
                if not await self._came_with_a_loss(refused, server, losses):
                    raise
                fault = refused
            else:
                if found.finish_reason != "abort":
                    return found
                self.counters.aborted += 1
                if self._is_paused or self._pauses != pauses:
                    continue  # as the pause mode has it: no fault
                fault = ServerLost(
                    f"The SGLang server at {self.clients[server].url} gave a request up that nobody aborted."
                )
            tries += 1
            if self._is_closed or tries == self.patience.tries:
                raise EngineError(
                    f"A request failed {tries} times, with pauses in between, so it is given up. The last time: {fault}"
                ) from fault
            self.counters.retries += 1
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, self.patience.longest_pause_s)

    async def _choose(self) -> int:
        """The live server with the fewest requests under way; waits until there is one, and weights have arrived."""
        while self._is_closed or self._is_paused or not (live := self.live()):
            if self._is_closed:
                raise EngineError("The connections to the SGLang servers are closed: the run is ending.")
            if len(self._gone) == len(self.clients):
                raise next(iter(self._gone.values()))
            self._change.clear()
            await self._change.wait()
        return min(live, key=self.in_flight.__getitem__)

    async def _ask(self, server: int, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        rid, losses = uuid.uuid4().hex, self.counters.lost
        routed = self.router if len(self.live()) == len(self.clients) else None
        task = asyncio.ensure_future((routed or self.clients[server]).generate(rid, prompt_ids, params))
        asked = None if routed else server
        self._asked[task] = asked, rid
        self.in_flight[server] += 1
        try:
            await self._answered(task, server)
            if task.done() and not task.cancelled():
                return task.result()
        finally:
            self.in_flight[server] -= 1
            del self._asked[task]
            if not task.done():
                task.cancel()
                self._abort(rid, asked)
        url = (routed or self.clients[server]).url
        if server not in self.live() or (routed and self.counters.lost != losses):
            raise ServerLost(f"The SGLang server at {url} was lost with a request under way.")
        raise ServerLost(
            f"The SGLang server at {url} has not answered a request for {self.patience.examinations} times "
            f"{self.request_timeout_s:g} s although it answers others. Raise --request-timeout-s if responses may take so long."
        )

    async def _answered(self, task: asyncio.Task[Completion], server: int) -> None:
        """Wait until `task` is done, its server is lost, or it was waited for too long."""
        examinations, losses = 0, self.counters.lost
        while examinations < self.patience.examinations:
            pauses = self._pauses
            done, _ = await asyncio.wait((task,), timeout=self.request_timeout_s)
            if done:
                return
            if self._is_paused or self._pauses != pauses:
                continue
            examinations += 1
            await self._examine(server)
            if server not in self.live() or (self.router and self.counters.lost != losses):
                return

    def _abort(self, rid: str, server: int | None) -> None:
        """Have the request given up in the background; by whichever server has it where a router chose: that passes
        only requests on."""

        async def abort(client: Client) -> None:
            with suppress(EngineError):
                await client.abort(rid)

        for index in self.live():
            if server in (None, index):
                task = asyncio.ensure_future(abort(self.clients[index]))
                self._aborts.add(task)
                task.add_done_callback(self._aborts.discard)

    async def _examine(self, server: int) -> None:
        """Find out whether a server with which something went wrong is lost; once for all that ask at the same time.

        Behind a router it may be any of them.
        """
        live = self.live()
        suspects = live if self.router else {server}.intersection(live)
        for suspect in suspects:
            if suspect not in self._examined:
                task = asyncio.ensure_future(self._mark_if_lost(suspect))
                self._examined[suspect] = task
                task.add_done_callback(lambda _, suspect=suspect: self._examined.pop(suspect, None))  # type: ignore[misc]
        await asyncio.gather(*(asyncio.shield(self._examined[suspect]) for suspect in suspects))

    async def _mark_if_lost(self, server: int) -> None:
        client, pauses = self.clients[server], self._pauses
        if await client.is_up():
            if self._is_paused or await client.can_generate():
                return
            if self._is_paused or self._pauses != pauses:
                return  # weights arrived meanwhile
        await self.mark_lost(server)

    async def _came_with_a_loss(self, refused: ServerRefused, server: int, losses: int) -> bool:
        """Whether a router's error, HTTP 5xx, tells of a server that was lost since there were `losses`."""
        if self.router is None or refused.url != self.router.url or refused.status < 500:
            return False
        await self._examine(server)
        return self.counters.lost != losses

    async def _return(self, server: int) -> None:
        try:
            if self.on_lost is None:
                raise EngineError(
                    f"The SGLang server at {self.clients[server].url} was lost, and nobody brings it back."
                )
            await self.on_lost(server)
        except Exception as error:  # noqa: BLE001 - told to those who wait, once no server is left
            self._gone[server] = error
        finally:
            del self._returning[server]
            self._change.set()
