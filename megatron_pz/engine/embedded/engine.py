"""The embedded engine: what rank 0 is asked for, all ranks decode with the weights that they train.

Coroutines on rank 0 await `generate`. Once no more requests come in, all that wait make a round: rank 0 sends them to
the other ranks (which are in `finish`), every replica decodes its share, rank 0 gathers and answers the coroutines, whose
next requests make the next round. Nothing depends on the clock.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from megatron_pz.engine.base import Conversation
from megatron_pz.engine.embedded.batch import Counters, Decoder, decode
from megatron_pz.engine.embedded.ranks import OneProcess, Ranks
from megatron_pz.engine.embedded.requests import Request, Response, check, shares
from megatron_pz.errors import EngineError
from megatron_pz.types import Completion, SamplingParams

T = TypeVar("T")

QUIET_TURNS = 2
"""Turns of the event loop without a new request after which a round begins."""


class Model(Decoder, Protocol):
    """A decoder whose weights can be exchanged, and that is told when it is used."""

    def load(self, weights: Any) -> None:
        """Decode with `weights` from now on."""
        ...

    def sampling(self) -> AbstractContextManager[None]:
        """Within the block the model is in the state for sampling; after it, as before."""
        ...


@dataclass(frozen=True)
class Deferred(Generic[T]):
    """A conversation that has not happened yet."""

    call: Callable[[], Awaitable[T]]


class EmbeddedEngine:
    """`engine.base.Engine` over a decoder.

    Args:
        model: decodes; on every rank of a replica with the same results.
        max_running_requests: rows that a replica decodes together.
        ranks: the other processes; None: there are none.
    """

    def __init__(self, model: Model, max_running_requests: int, ranks: Ranks | None = None) -> None:
        if max_running_requests < 1:
            raise EngineError(f"engine.max_running_requests is {max_running_requests}; it must be at least 1.")
        self.model, self.max_running_requests, self.ranks = model, max_running_requests, ranks or OneProcess()
        self.counters = Counters()
        self._version = -1
        self._waiting: list[tuple[Request, asyncio.Future[Completion]]] = []
        self._is_broken = False

    @property
    def version(self) -> int:
        """Of the weights that sample now; -1 before the first `load`."""
        return self._version

    async def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        """One sampled response; see `engine.base.Engine`. On rank 0 only.

        Raises:
            EngineError: the request is out of range, no weights were loaded, or logits are not finite.
        """
        if self._version < 0:
            raise EngineError("The engine has no weights yet; call load(weights, version) before generate.")
        request = Request(tuple(int(token) for token in prompt_ids), params)
        check(request, self.model.vocab_size, self.model.max_positions)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Completion] = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._turn, loop.call_soon, 1, 0)
        self._waiting.append((request, future))
        return await future

    def begin(self, call: Callable[[], Awaitable[T]]) -> Deferred[T]:
        """Put the conversation down; it happens in `finish`, since sampling and training take turns."""
        return Deferred(call)

    def finish(self, begun: Conversation[T]) -> T | None:
        """Hold the conversation on rank 0 while the other ranks decode their share of every round.

        After a failed round the ranks are out of step: nothing is sent, and the others end when rank 0 does.
        """
        if self.ranks.rank != 0:
            while (requests := self.ranks.broadcast(None)) is not None:
                self._answer(requests)
            return None

        async def run() -> T:
            return await begun.call()

        try:
            return asyncio.run(run())
        finally:
            if not self._is_broken:
                self.ranks.broadcast(None)

    def load(self, weights: Any, version: int) -> None:
        """Sample from `weights` and stamp tokens with `version`, on every rank."""
        if self._waiting:
            raise EngineError(f"Weights of version {version} came while {len(self._waiting)} requests were waiting.")
        self.model.load(weights)
        self._version = version

    def sleep(self) -> None:
        """Nothing is held between rounds."""

    def wake(self) -> None:
        """Nothing was given up."""

    def lap(self) -> Mapping[str, float]:
        """Nothing goes wrong unseen."""
        return {}

    def close(self) -> None:
        """Nothing is held between rounds."""

    def _turn(self, call_soon: Callable[..., Any], seen: int, quiet: int) -> None:
        """A turn of the event loop: wait for more requests, or run the round."""
        quiet = quiet + 1 if len(self._waiting) == seen else 0
        if quiet < QUIET_TURNS:
            call_soon(self._turn, call_soon, len(self._waiting), quiet)
            return
        batch = [(request, future) for request, future in self._waiting if not future.done()]
        self._waiting = []
        if not batch:
            return
        try:
            completions = self._round([request for request, _ in batch])
        except Exception as error:  # noqa: BLE001 - every coroutine that waits gets it, none would hear of it otherwise
            self._is_broken = True
            for _, future in batch:
                future.set_exception(error)
            return
        for (_, future), completion in zip(batch, completions, strict=True):
            future.set_result(completion)

    def _round(self, requests: list[Request]) -> list[Completion]:
        """Completions of `requests`, in order, by all ranks."""
        responses: dict[int, Response] = {}
        for part in self._answer(self.ranks.broadcast(requests)):
            responses.update(part)
        return [responses[index].completion(request, self._version) for index, request in enumerate(requests)]

    def _answer(self, requests: Sequence[Request]) -> list[dict[int, Response]]:
        """Decode this replica's share; on rank 0 the shares of all, as {index of request: response}."""
        own = shares([request.prompt_ids for request in requests], self.ranks.num_replicas)[self.ranks.replica]
        with self.model.sampling():
            sampled = decode([requests[index] for index in own], self.model, self.max_running_requests, self.counters)
        answer = dict(zip(own, sampled, strict=True)) if self.ranks.is_speaker else {}
        return self.ranks.gather(answer)
