"""Servers alone, for a job step of their own: started, watched, started again when lost, ended on a signal."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Sequence

from megatron_pz.engine.sglang.fleet import LaunchedFleet

WATCH_INTERVAL_S = 1.0
TELL_INTERVAL_S = 10.0


async def serve(
    fleet: LaunchedFleet, timeout_s: float, tell: Callable[[str], None], ready: Callable[[], None] = lambda: None
) -> None:
    """Start the servers of `fleet` and keep them until SIGTERM or SIGINT; none is left when this returns.

    Args:
        timeout_s: until a server must be ready.
        tell: takes a line about what happens.
        ready: called once, when all servers answer.

    Raises:
        EngineError: a server did not become ready, at first or after it was lost.
    """
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    keeping = asyncio.create_task(_keep(fleet, timeout_s, tell, ready))
    asking = asyncio.create_task(asked.wait())
    try:
        await asyncio.wait([keeping, asking], return_when=asyncio.FIRST_COMPLETED)
        if keeping.done():
            keeping.result()
        tell("servers are stopped")
    finally:
        keeping.cancel()
        asking.cancel()
        await asyncio.gather(keeping, asking, return_exceptions=True)
        await asyncio.to_thread(fleet.stop)


async def _keep(fleet: LaunchedFleet, timeout_s: float, tell: Callable[[str], None], ready: Callable[[], None]) -> None:
    told_s = 0.0

    def progress(waited_s: float, what: str) -> None:
        nonlocal told_s
        if not told_s <= waited_s < told_s + TELL_INTERVAL_S:  # a restart counts from 0 again
            told_s = waited_s
            tell(f"{waited_s:.0f} s: {what}")

    fleet.start()
    await fleet.wait_ready(timeout_s, progress)
    ready()
    while True:
        await asyncio.sleep(WATCH_INTERVAL_S)
        for index, server in enumerate(fleet.servers):
            if not server.is_alive():
                tell(f"{server.death()}It is started again.")
                await fleet.restart(index, timeout_s, progress)
                tell(f"{server.url} answers again")


def public_urls(urls: Sequence[str]) -> list[str]:
    """`urls` as other machines reach them: a server that listens on every address is called by this machine's name."""
    return [url.replace("//0.0.0.0:", f"//{socket.gethostname()}:") for url in urls]
