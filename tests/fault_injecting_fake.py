"""Speaks as much of SGLang's HTTP as a client needs, and fails as it is told: for what a real server cannot be made to do.

    async with FakeServer() as fake:
        fake.next += [refuse(503, "no room"), hang]     # what the next requests get; all later ones are answered
        ...
        fake.received, fake.aborted, fake.most_under_way

The response to a prompt is a function of the prompt: tokens sum(prompt) + 1, + 2, ... modulo VOCAB_SIZE with log-probs
-1/8, -2/8, ..., always as many as were asked for. Tests of what SGLang itself does are in tests/sglang.
"""

from __future__ import annotations

import asyncio
import base64
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
from aiohttp import web

from megatron_pz.types import Completion, SamplingParams

VOCAB_SIZE = 100
EXPERTS_SHAPE = (2, 3)

Reply = dict[str, Any]
Behaviour = Callable[["FakeServer", web.Request, Reply], Awaitable[web.StreamResponse]]
"""Answers a request whose proper reply is the last argument."""


def expected(prompt_ids: Sequence[int], params: SamplingParams, version: int = 0) -> Completion:
    """What a well server answers."""
    count = params.max_new_tokens
    tokens = tuple((sum(prompt_ids) + place) % VOCAB_SIZE for place in range(1, count + 1))
    logprobs = tuple(-place / 8 for place in range(1, count + 1))
    return Completion(tuple(prompt_ids), tokens, logprobs, "length", (version,) * count)


async def answer(fake: FakeServer, request: web.Request, reply: Reply) -> web.StreamResponse:
    """As a well server."""
    return web.json_response(reply)


def changed(change: Callable[[Reply], object]) -> Behaviour:
    """Answers after `change` has edited the reply."""

    async def behave(fake: FakeServer, request: web.Request, reply: Reply) -> web.StreamResponse:
        change(reply)
        return web.json_response(reply)

    return behave


def late(seconds: float) -> Behaviour:
    """Answers after `seconds`, or once the request is aborted."""

    async def behave(fake: FakeServer, request: web.Request, reply: Reply) -> web.StreamResponse:
        try:
            await asyncio.wait_for(fake.abort_of(reply["meta_info"]["id"]), seconds)
            reply["meta_info"]["finish_reason"] = {"type": "abort"}
        except TimeoutError:
            pass
        return web.json_response(reply)

    return behave


hang: Behaviour = late(3600)


def refuse(status: int, text: str) -> Behaviour:
    """Answers with an error of HTTP."""

    async def behave(fake: FakeServer, request: web.Request, reply: Reply) -> web.StreamResponse:
        return web.Response(status=status, text=text)

    return behave


async def cut_before(fake: FakeServer, request: web.Request, reply: Reply) -> web.StreamResponse:
    """Closes the connection instead of an answer."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def cut_within(fake: FakeServer, request: web.Request, reply: Reply) -> web.StreamResponse:
    """Closes the connection in the middle of the body."""
    response = web.StreamResponse(headers={"Content-Length": "1000"})
    await response.prepare(request)
    await response.write(b'{"output_ids": [1, 2')
    assert request.transport is not None
    request.transport.close()
    return response


class FakeServer:
    """Listens on loopback while the `async with` block runs, and may be killed and started again in it."""

    def __init__(self, version: int = 0) -> None:
        self.version = version
        self.next: deque[Behaviour] = deque()
        self.always: Behaviour = answer  # when `next` is used up
        self.received: list[Reply] = []  # bodies of /generate
        self.aborted: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.under_way = self.most_under_way = 0
        self.health: int | None = 200  # of /health_generate; None: never answers
        self.num_examined = 0
        self.port = 0
        self._aborts: dict[str, asyncio.Event] = {}
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> FakeServer:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    async def start(self) -> None:
        """Listen; on the same port as before."""
        app = web.Application()
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/abort_request", self._abort)
        app.router.add_get("/model_info", self._model_info)
        app.router.add_get("/health_generate", self._health)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        await (site := web.TCPSite(self._runner, "127.0.0.1", self.port)).start()
        assert site._server is not None
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]

    async def kill(self) -> None:
        """Close all connections and listen no more."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def abort_of(self, rid: str) -> None:
        """Wait until the request `rid` is aborted."""
        await self._aborts.setdefault(rid, asyncio.Event()).wait()

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.received.append(body)
        self.headers.append(dict(request.headers))
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await asyncio.sleep(0.001)  # so that those that come together are under way together
            behave = self.next.popleft() if self.next else self.always
            return await behave(self, request, self._reply(body))
        finally:
            self.under_way -= 1

    async def _abort(self, request: web.Request) -> web.Response:
        rid = (await request.json())["rid"]
        self.aborted.append(rid)
        self._aborts.setdefault(rid, asyncio.Event()).set()
        return web.Response(text="")

    async def _model_info(self, request: web.Request) -> web.Response:
        return web.json_response({"weight_version": str(self.version)})

    async def _health(self, request: web.Request) -> web.Response:
        self.num_examined += 1
        if self.health is None:
            await asyncio.sleep(3600)
        return web.Response(status=self.health or 200)

    def _reply(self, body: Reply) -> Reply:
        ids, count = body["input_ids"], body["sampling_params"]["max_new_tokens"]
        found = expected(ids, SamplingParams(count))
        meta: Reply = {
            "id": body["rid"],
            "finish_reason": {"type": "length", "length": count},
            "weight_version": str(self.version),
            "output_token_logprobs": [[p, t, None] for p, t in zip(found.logprobs, found.token_ids, strict=True)],
        }
        if body.get("return_routed_experts"):
            shape = (len(ids) + count - 1, *EXPERTS_SHAPE)
            experts = np.arange(np.prod(shape), dtype=np.int32)
            meta["routed_experts"] = base64.b64encode(experts.tobytes()).decode()
        return {"output_ids": list(found.token_ids), "meta_info": meta}
