"""Having questions answered, once: a response is kept under a name made of the model, the prompt and how it was sampled.

The file is appended to as responses land. After a kill the same call asks only for what is not there; another model, prompt,
temperature or length is another name, and nothing is ever mixed up.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron_pz.engine.openai_url import OpenAIServers
from megatron_pz.report.jsonl import JsonLines, read_rows
from megatron_pz.types import Generate, SamplingParams, Tokenizer


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: equal asks have equal names."""

    prompt: str
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int

    def name(self, model: str) -> str:
        """32 hex digits."""
        parts = [model, self.prompt, self.max_new_tokens, self.temperature, self.top_p, self.seed]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class Response:
    """What was answered to one question."""

    text: str
    is_cut: bool  # at the token limit
    num_tokens: int


Answer = Callable[[Ask], Awaitable[Response]]


class Kept:
    """The file of responses."""

    def __init__(self, path: Path) -> None:
        self._known = {
            str(row["name"]): Response(str(row["text"]), bool(row["is_cut"]), int(row["num_tokens"]))
            for row in read_rows(path)
            if {"name", "text", "is_cut", "num_tokens"} <= row.keys()
        }
        self._file = JsonLines(path)

    def __len__(self) -> int:
        return len(self._known)

    def get(self, name: str) -> Response | None:
        return self._known.get(name)

    def add(self, name: str, response: Response) -> None:
        """Keep it; it outlives this process when this returns."""
        self._known[name] = response
        row = {"name": name, "text": response.text, "is_cut": response.is_cut, "num_tokens": response.num_tokens}
        self._file.append([row])

    def close(self) -> None:
        self._file.close()


async def answer_all(
    asks: Sequence[Ask],
    model: str,
    answer: Answer,
    kept: Kept,
    *,
    at_once: int = 256,
    landed: Callable[[int], None] = lambda count: None,
) -> list[Response]:
    """Responses in the order of `asks`, those that are kept not asked for again.

    Args:
        model: name of the weights.
        at_once: requests under way; with the embedded engine also those of a round, after which they are kept.
        landed: told how many more are there.
    """
    slots = asyncio.Semaphore(at_once)

    async def one(ask: Ask, name: str) -> None:
        async with slots:
            kept.add(name, await answer(ask))
        landed(1)

    names = [ask.name(model) for ask in asks]
    wanted = {name: ask for name, ask in zip(names, asks, strict=True) if kept.get(name) is None}
    landed(len(asks) - len(wanted))
    tasks = [asyncio.ensure_future(one(ask, name)) for name, ask in wanted.items()]
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
    found = [kept.get(name) for name in names]
    return [response for response in found if response is not None]


def engine_answer(generate: Generate, tokenizer: Tokenizer, style: str, longest: int) -> Answer:
    """Asks an engine of ours.

    Args:
        style: as `task.prompt_style`.
        longest: most tokens of prompt and response together. A prompt that leaves less has a shorter response, and one
            that leaves nothing an empty one, cut off.
    """

    async def answer(ask: Ask) -> Response:
        ids = (
            tokenizer.apply_chat(ask.prompt)
            if style == "chat"
            else [*tokenizer.bos_token_ids, *tokenizer.encode(ask.prompt)]
        )
        if (room := min(ask.max_new_tokens, longest - len(ids))) < 1:
            return Response("", True, 0)
        params = SamplingParams(room, ask.temperature, ask.top_p, stop_token_ids=tokenizer.eos_token_ids, seed=ask.seed)
        completion = await generate(ids, params)
        return Response(
            tokenizer.decode(completion.token_ids), completion.finish_reason != "stop", len(completion.token_ids)
        )

    return answer


def url_answer(servers: OpenAIServers, threads: ThreadPoolExecutor) -> Answer:
    """Asks servers that speak OpenAI's HTTP."""

    def complete(ask: Ask) -> Response:
        # A seed is a wish: many servers ignore it, and then the same ask may be answered otherwise another day.
        told = servers.complete(
            ask.prompt, ask.max_new_tokens, temperature=ask.temperature, top_p=ask.top_p, seed=ask.seed & 0x7FFFFFFF
        )
        return Response(told.text, told.is_cut, told.num_tokens)

    async def answer(ask: Ask) -> Response:
        return await asyncio.get_running_loop().run_in_executor(threads, complete, ask)

    return answer
