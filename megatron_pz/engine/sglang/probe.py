"""Does a server answer? Asked in a thread of its own.

The event loop that speaks with the servers may be late by seconds, when thousands of requests begin at once or the machine is
full; what came in time then looks as if it had not, and a server that is well would be given up.
"""

from __future__ import annotations

import asyncio
import http.client
import threading
import urllib.request
from collections.abc import Mapping
from contextlib import suppress

_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # servers are spoken to without a proxy


async def answers(url: str, headers: Mapping[str, str], timeout_s: float) -> bool:
    """Whether a GET of `url` is answered with HTTP 200, with no silence longer than `timeout_s`."""
    loop = asyncio.get_running_loop()
    found: asyncio.Future[bool] = loop.create_future()

    def tell(told: bool) -> None:
        if not found.done():  # nobody waits any longer
            found.set_result(told)

    def ask() -> None:
        told = _is_answered(url, headers, timeout_s)
        with suppress(RuntimeError):  # the loop has been closed meanwhile
            loop.call_soon_threadsafe(tell, told)

    threading.Thread(target=ask, name="server probe", daemon=True).start()
    return await found


def _is_answered(url: str, headers: Mapping[str, str], timeout_s: float) -> bool:
    try:
        with _OPENER.open(urllib.request.Request(url, headers=dict(headers)), timeout=timeout_s) as reply:
            reply.read()
            return bool(reply.status == 200)
    except (OSError, http.client.HTTPException):  # HTTP's own errors among them
        return False
