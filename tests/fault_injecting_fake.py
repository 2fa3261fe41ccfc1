"""An HTTP server with the paths of SGLang that answers wrongly when it is told to.

For what the real server cannot be made to do, or not at a chosen moment; what it answers otherwise has the shape of the
real replies (tests/sglang sees those).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from aiohttp import web

from megatron_pz.types import Completion

VOCAB_SIZE = 100
CONTEXT_LENGTH = 64


def answer(body: Mapping[str, Any], version: str = "3") -> dict[str, Any]:
    """The reply to a /generate request: ids follow from the prompt, every log-prob is -0.5."""
    count = body["sampling_params"]["max_new_tokens"]
    ids = [(sum(body["input_ids"]) + place) % VOCAB_SIZE for place in range(count)]
    return {
        "output_ids": ids,
        "meta_info": {
            "id": body["rid"],
            "finish_reason": {"type": "length", "length": count},
            "output_token_logprobs": [[-0.5, token, None] for token in ids],
            "weight_version": version,
            "weight_versions": [{"version": version, "start": 0, "end": count}],
        },
    }


def is_answer(completion: Completion, count: int) -> bool:
    """Whether `completion` is what the fake says to its prompt."""
    ids = tuple((sum(completion.prompt_ids) + place) % VOCAB_SIZE for place in range(count))
    return completion.token_ids == ids and completion.logprobs == (-0.5,) * count


class FaultInjectingFake:
    """Answers request n as `script` has it at n, and well when the script has ended.

    A word of the script is a status (400), seconds to answer late by (0.2), "hang", "cut" (the connection, before an
    answer), "cut body" (in the middle of one), "abort" (the request was given up), or what changes the reply: a function
    of it that returns another, or text.
    """

    def __init__(self, script: Iterable[int | float | str | Callable[[Any], Any]] = ()) -> None:
        self._script = iter(script)
        self.generates = self.fronts = True  # whether /health_generate, and whether /model_info answer
        self.is_paused = False  # then /generate and /health_generate wait
        self.requests: list[dict[str, Any]] = []
        self.headers: list[Mapping[str, str]] = []
        self.aborted: list[str] = []
        self.examinations = 0
        self.under_way = self.most_under_way = 0
        self.url = ""
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> FaultInjectingFake:
        app = web.Application()
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/abort_request", self._abort)
        app.router.add_get("/model_info", self._model_info)
        app.router.add_get("/health_generate", self._health)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = site.name
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.die()

    async def die(self) -> None:
        """Stop listening, and cut every connection."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        self.headers.append(request.headers)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            return await self._scripted(request, body, next(self._script, None))
        finally:
            self.under_way -= 1

    async def _scripted(self, request: web.Request, body: dict[str, Any], word: Any) -> web.StreamResponse:
        while self.is_paused:
            await asyncio.sleep(0.01)
        reply: Any = answer(body)
        if isinstance(word, int):
            return web.json_response({"error": {"message": f"as told: {word}"}}, status=word)
        if isinstance(word, float):
            await asyncio.sleep(word)
        elif word == "hang":
            await asyncio.sleep(3600)
        elif word == "cut":
            assert request.transport is not None
            request.transport.abort()
        elif word == "cut body":
            response = web.StreamResponse(headers={"Content-Length": "1000"})
            await response.prepare(request)
            await response.write(b'{"output_ids": [')
            assert request.transport is not None
            request.transport.abort()
            return response
        elif word == "abort":
            reply["meta_info"]["finish_reason"] = {"type": "abort", "message": "Aborted"}
        elif callable(word):
            reply = word(reply)
        if isinstance(reply, str):
            return web.Response(text=reply)
        return web.json_response(reply)

    async def _abort(self, request: web.Request) -> web.Response:
        self.aborted.append((await request.json())["rid"])
        return web.Response()

    async def _model_info(self, _: web.Request) -> web.Response:
        while not self.fronts:
            await asyncio.sleep(0.01)
        return web.json_response({"weight_version": "3"})

    async def _health(self, _: web.Request) -> web.Response:
        self.examinations += 1
        while not self.generates or self.is_paused:
            await asyncio.sleep(0.01)
        return web.Response()
