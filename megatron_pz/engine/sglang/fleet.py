"""The servers of a run: started by it, or running already and attached to."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import random
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import aiohttp

from megatron_pz.engine.sglang.server import (
    PROBE_INTERVAL_S,
    PROBE_TIMEOUT_S,
    PortTaken,
    ServerProcess,
    ServerSpec,
    write_secret,
)
from megatron_pz.engine.sglang.versions import check_version
from megatron_pz.errors import EngineError

KEY_FILE = "server.key"
PORT_ATTEMPTS = 3
QUIET_PORTS = range(20000, 32000)  # Linux gives 32768 to 60999 to connections

Progress = Callable[[float, str], None]
"""Told the seconds waited and what is waited for."""


def make_key(run_dir: Path) -> str:
    """A new key for the servers of the run; its file in the run's folder is for its owner's eyes only."""
    key = secrets.token_hex(16)
    write_secret(run_dir / KEY_FILE, key)
    return key


class Fleet(Protocol):
    """Servers by their index. Coroutines may run in any event loop, `stop` in any thread."""

    @property
    def urls(self) -> tuple[str, ...]:
        """Where each is spoken to."""
        ...

    async def wait_ready(self, timeout_s: float, progress: Progress) -> None:
        """Wait until every server answers; an EngineError where one does not in time."""
        ...

    async def restart(self, server: int, timeout_s: float, progress: Progress) -> None:
        """Bring `server`, which was lost, back; ready, with the weights of its model folder."""
        ...

    def is_alive(self, server: int) -> bool:
        """Whether its process runs, as far as can be known."""
        ...

    def stop(self) -> None:
        """End what the run has started; for good."""
        ...


class LaunchedFleet:
    """Servers of `specs`; a port 0 is chosen when the server is started. They end with this process.

    `urls` are known when `start` has returned, and are final when `wait_ready` has: a server whose port another program
    took before it could listen is started again on another.
    """

    def __init__(self, specs: Sequence[ServerSpec]) -> None:
        self.specs = list(specs)
        self.servers: list[ServerProcess] = []
        self._lock = threading.Lock()
        self._is_stopped = False

    @property
    def urls(self) -> tuple[str, ...]:
        """One a server."""
        return tuple(server.url for server in self.servers)

    def start(self) -> None:
        """Start all servers; they are ready later.

        Raises:
            EngineError: one cannot be started; none is left then.
        """
        try:
            for index, spec in enumerate(self.specs):
                self.servers.append(ServerProcess(self._with_port(spec)))
                fixed = functools.partial(refuse_taken, spec.host, spec.port) if spec.port else lambda: None
                self._start(index, fixed)
        except BaseException:
            self.stop()
            raise

    async def wait_ready(self, timeout_s: float, progress: Progress) -> None:
        """See `Fleet`. Where one server fails, all are stopped."""
        try:
            async with asyncio.TaskGroup() as group:
                for index in range(len(self.servers)):
                    group.create_task(self._wait(index, timeout_s, progress))
        except BaseExceptionGroup as failed:
            await asyncio.to_thread(self.stop)
            raise failed.exceptions[0] from failed
        except asyncio.CancelledError:
            await asyncio.to_thread(self.stop)
            raise

    async def restart(self, server: int, timeout_s: float, progress: Progress) -> None:
        """See `Fleet`. What is left of it is killed: it may hang."""
        await asyncio.to_thread(self.servers[server].stop, at_once=True)
        await asyncio.to_thread(self._start, server)
        await self.servers[server].wait_ready(timeout_s, progress)

    def is_alive(self, server: int) -> bool:
        """See `Fleet`."""
        return self.servers[server].is_alive()

    def stop(self) -> None:
        """See `Fleet`. All at the same time: each may take seconds."""
        with self._lock:
            self._is_stopped = True
        threads = [threading.Thread(target=server.stop) for server in self.servers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _start(self, index: int, check: Callable[[], None] = lambda: None) -> None:
        with self._lock:  # a restart in the background must not outlive `stop`
            if self._is_stopped:
                raise EngineError(f"The SGLang server at {self.servers[index].url} is not started: the run is ending.")
            self.servers[index].start(check)

    async def _wait(self, index: int, timeout_s: float, progress: Progress) -> None:
        def tell(waited_s: float, line: str) -> None:
            progress(waited_s, f"server {index}: {line}")

        for attempt in range(1, PORT_ATTEMPTS + 1):
            try:
                return await self.servers[index].wait_ready(timeout_s, tell)
            except PortTaken:
                if self.specs[index].port or attempt == PORT_ATTEMPTS:
                    raise
            self.servers[index] = ServerProcess(self._with_port(self.specs[index]))
            await asyncio.to_thread(self._start, index)

    def _with_port(self, spec: ServerSpec) -> ServerSpec:
        if spec.port:
            return spec
        taken = {server.spec.port for server in self.servers}
        while (port := free_port(spec.host)) in taken:
            pass
        return dataclasses.replace(spec, port=port)


class AttachedFleet:
    """Servers at `urls`, started by others, who also restart them."""

    def __init__(self, urls: Sequence[str], api_key: str) -> None:
        self._urls = tuple(url.rstrip("/") for url in urls)
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    @property
    def urls(self) -> tuple[str, ...]:
        """See `Fleet`."""
        return self._urls

    async def wait_ready(self, timeout_s: float, progress: Progress) -> None:
        """See `Fleet`. A paused server counts as ready."""
        for url in self.urls:
            await self._wait(url, timeout_s, progress)

    async def restart(self, server: int, timeout_s: float, progress: Progress) -> None:
        """See `Fleet`. Waits for whoever started it to start it again."""
        await self._wait(self.urls[server], timeout_s, progress)

    def is_alive(self, server: int) -> bool:
        """See `Fleet`. Not known from here."""
        return True

    def stop(self) -> None:
        """Nothing: the servers are not the run's."""

    async def _wait(self, url: str, timeout_s: float, progress: Progress) -> None:
        began = told = time.monotonic()
        timeout = aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout, headers=self._headers) as session:
            while True:
                try:
                    # Not /health, which generates a token, and so does not answer while the server is paused.
                    async with session.get(f"{url}/server_info") as reply:
                        if reply.status == 200:
                            return check_version(str((await reply.json()).get("version")), url)
                        if reply.status in (401, 403):
                            raise EngineError(
                                f"{url} refuses the key (HTTP {reply.status}). Name the servers' key by --api-key-file."
                            )
                        found = f"HTTP {reply.status}"
                except (aiohttp.ClientError, TimeoutError) as error:
                    found = str(error) or type(error).__name__
                waited = time.monotonic() - began
                if waited > timeout_s:
                    raise EngineError(
                        f"No SGLang server answered at {url} for {waited:.0f} s (last: {found}). Start it (tools/serve.py), mend "
                        "--server-urls, or give it longer with --server-start-timeout-s."
                    )
                if time.monotonic() - told >= 1:
                    told = time.monotonic()
                    progress(waited, f"{url}: {found}")
                await asyncio.sleep(PROBE_INTERVAL_S)


def free_port(host: str) -> int:
    """A port of `host` that nobody uses now. Another program may take it before it is used.

    Of those below the range from which the system gives ports to connections, which come and go by the hundred; of any
    where these are not to be had.
    """
    candidates = random.Random().sample(QUIET_PORTS, 20)
    for port in (*candidates, 0):
        with socket.socket() as listener, suppress(OSError):
            listener.bind((host, port))
            return int(listener.getsockname()[1])
    raise EngineError(f"A server cannot listen on {host}: none of its ports can be had. Choose another --server-host.")


def refuse_taken(host: str, port: int) -> None:
    """Find out at once, and not after a model was loaded, that another program listens.

    Raises:
        EngineError: `port` cannot be listened on.
    """
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            listener.bind((host, port))
        except OSError as error:
            raise EngineError(
                f"A server cannot listen on {host}:{port}: {error.strerror}. Choose another --server-port, or 0 for any, "
                "or another --server-host."
            ) from error
