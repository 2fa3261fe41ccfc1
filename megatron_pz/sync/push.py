"""One version of the weights, handed over to servers: pause, send, check, go on.

A server at which anything fails is left out from there on and reported; its engine restarts it, so none ever goes on with
a part of one version and a part of another.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_pz.engine.sglang.control import Control, PauseMode
from megatron_pz.engine.sglang.faults import ServerRefused
from megatron_pz.engine.sglang.io_thread import IoThread
from megatron_pz.errors import EngineError

IDLE_TIMEOUT_S, IDLE_INTERVAL_S = 1800.0, 0.2


class Receivers:
    """The servers that have taken everything so far. Rank 0 has them; the other ranks have none.

    Args:
        controls: by index of the server.
    """

    def __init__(self, io: IoThread | None, controls: Mapping[int, Control]) -> None:
        self._io, self.controls = io, dict(controls)
        self.faults: dict[int, EngineError] = {}

    def each(self, call: Callable[[Control], Awaitable[Any]]) -> dict[int, Any]:
        """What `call` gives for each server; all at the same time. One that fails is left out from now on."""
        if not self.controls:
            return {}
        assert self._io is not None
        return self.settle(self._io.run(self.gathered(call)))

    def settle(self, found: Mapping[int, Any]) -> dict[int, Any]:
        """What `gathered` found for the servers that did not fail; the others are left out from now on."""
        for server, result in found.items():
            if isinstance(result, EngineError):
                self.drop(server, result)
            elif isinstance(result, BaseException):
                raise result
        return {server: result for server, result in found.items() if server in self.controls}

    def drop(self, server: int, fault: EngineError) -> None:
        """Leave `server` out."""
        self.faults[server] = fault
        del self.controls[server]

    async def gathered(self, call: Callable[[Control], Awaitable[Any]]) -> dict[int, Any]:
        """For each server what `call` gives, or its error. To be run in the background thread."""
        return await self.gathered_by_server(lambda _, control: call(control))

    async def gathered_by_server(self, call: Callable[[int, Control], Awaitable[Any]]) -> dict[int, Any]:
        """`gathered`, where the call depends on the server's index."""
        asked = [call(server, control) for server, control in self.controls.items()]
        results = await asyncio.gather(*asked, return_exceptions=True)
        return dict(zip(self.controls, results, strict=True))


async def flush_when_idle(control: Control) -> None:
    """After a pause in place: have `control`'s server forget the old weights' prefixes, as soon as it can.

    Requests under way go on with their old caches and leave them behind for others to find; the server refuses to forget
    them before these requests are done. New ones must not be sent meanwhile. The run's own servers keep no prefixes.

    Raises:
        ServerRefused: requests, perhaps another program's, still ran after IDLE_TIMEOUT_S.
    """
    if (await control.server_info()).get("disable_radix_cache"):
        return
    deadline = time.monotonic() + IDLE_TIMEOUT_S
    while True:
        try:
            return await control.flush_cache()
        except ServerRefused:
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(IDLE_INTERVAL_S)


class Transport(Protocol):
    """How tensors get from the trainer's ranks to servers."""

    def send(self, weights: Any, version: int, receivers: Receivers) -> Sent:
        """All ranks. Servers are paused; their caches are flushed afterwards."""
        ...


class Checks(Protocol):
    """Do the servers have what they were given? Both drop those that do not."""

    def weights(self, weights: Any, receivers: Receivers) -> None:
        """All ranks; servers are paused."""
        ...

    def probe(self, receivers: Receivers) -> None:
        """Rank 0; servers generate."""
        ...


@dataclass(frozen=True)
class Sent:
    """What a transport did."""

    num_bytes: int
    largest_bucket_bytes: int


@dataclass(frozen=True)
class PushReport:
    """What a push did, on rank 0."""

    version: int
    seconds: float
    num_bytes: int
    largest_bucket_bytes: int
    faults: Mapping[int, EngineError] = field(default_factory=dict)  # by server


class WeightPush:
    """`engine.sglang.engine.Push` by one transport.

    Args:
        transport: sends.
        io, controls: of rank 0; None and empty elsewhere.
        pause_mode: what happens to requests under way.
        paused: told True when servers are about to pause, and False when requests may be sent again.
        verify: further checks of all servers that took the weights, at each push (sync/verify.py).
        tell: takes a line about each server that did not take them.
        examine: raises an error if the weights are not what servers can be given; at the first push, before all else.
    """

    def __init__(
        self,
        transport: Transport,
        io: IoThread | None,
        controls: Sequence[Control],
        pause_mode: PauseMode,
        paused: Callable[[bool], None] = lambda is_paused: None,
        verify: Checks | None = None,
        tell: Callable[[str], None] = lambda line: None,
        examine: Callable[[Any], None] = lambda weights: None,
    ) -> None:
        self.transport, self._io, self._controls, self._tell = transport, io, controls, tell
        self.pause_mode, self._paused, self._verify, self._examine = pause_mode, paused, verify, examine
        self.last: PushReport | None = None

    def __call__(self, weights: Any, version: int, servers: Sequence[int]) -> list[int]:
        """Hand `weights` over; servers that did not take them. All ranks; `servers` is known on rank 0."""
        began = time.monotonic()
        if self.last is None:
            self._examine(weights)
        receivers = Receivers(self._io, {server: self._controls[server] for server in servers})
        keeps_caches = self.pause_mode == "in_place"
        self._paused(True)
        try:
            receivers.each(lambda control: control.pause(self.pause_mode))
            sent = self.transport.send(weights, version, receivers)
            if not keeps_caches:
                receivers.each(lambda control: control.flush_cache())
            receivers.each(lambda control: control.set_weight_version(str(version)))
            self._check_version(version, receivers)
            if self._verify is not None:
                self._verify.weights(weights, receivers)
            receivers.each(lambda control: control.continue_generation())
            if keeps_caches:
                receivers.each(flush_when_idle)
            if self._verify is not None:
                self._verify.probe(receivers)
        finally:
            self._paused(False)
        self.last = PushReport(
            version, time.monotonic() - began, sent.num_bytes, sent.largest_bucket_bytes, dict(receivers.faults)
        )
        for server, fault in receivers.faults.items():
            self._tell(f"SGLang server {server} did not take weights of version {version}: {fault}")
        return sorted(receivers.faults)

    def _check_version(self, version: int, receivers: Receivers) -> None:
        for server, found in receivers.each(lambda control: control.weight_version()).items():
            if found != str(version):
                url = receivers.controls[server].url
                fault = EngineError(f"{url} says that it has weights of version {found}; {version} were handed over.")
                receivers.drop(server, fault)
