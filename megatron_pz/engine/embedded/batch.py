"""Continuous batching: prompts are prefilled once, rows decoded together; who is done makes room for who waits.

1. A response depends on weights, prompt and params; not on the batch, its size or its order.
2. Every rank of a replica that runs this with the same requests does the same forwards in the same order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from megatron_pz.engine.embedded.cache import DecodePlan, Piece, PrefillPlan, SharedPromptCache
from megatron_pz.engine.embedded.requests import Request, Response
from megatron_pz.engine.embedded.sampler import RowParams, sample, uniforms
from megatron_pz.types import FinishReason

PREFILL_TOKENS = 8192
"""Prompt tokens of one forward; a longer single prompt still goes alone."""


class Decoder(Protocol):
    """A model that can be fed token by token. `train.decode.PolicyDecoder` is the one in use."""

    vocab_size: int  # real ids, without padding
    max_positions: int  # longest prompt and response together

    @property
    def device(self) -> torch.device:
        """Where tokens and positions go."""
        ...

    def logits(self, cache: SharedPromptCache, token_ids: Tensor, positions: Tensor, wanted: Tensor | None) -> Tensor:
        """Logits [n, V] after the new tokens `wanted` (int64 [n]; None: all), while `cache.attend` answers for attention.

        Args:
            token_ids: int64 [s], new tokens as the cache's plan has them.
            positions: int64 [s], of each in its row.
        """
        ...


@dataclass
class Counters:
    """Work done so far."""

    prefilled_tokens: int = 0  # prompt tokens that went through the model
    prompt_tokens: int = 0  # of unique prompts; the difference was taken over from prompts that begin alike
    decoded_tokens: int = 0  # response tokens sampled
    decode_steps: int = 0


@dataclass(eq=False)
class _Prompt:
    """A unique prompt and the requests that share it."""

    ids: tuple[int, ...]
    waiting: deque[int]  # indices of requests that have no row yet
    unfinished: int
    slot: int = -1  # in the cache; -1: not there (any more)
    logits: Tensor | None = None  # [V] after its last token, kept until the last request has its row


@dataclass(eq=False)
class _Row:
    """A response in the making."""

    index: int  # of its request
    request: Request
    prompt: _Prompt
    limit: int  # tokens at which it ends
    draws: Iterator[float]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def add(self, token: int, logprob: float) -> FinishReason | None:
        """Take a sampled token in; the reason if it is the last."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if token in self.request.params.stop_token_ids:
            return "stop"
        return "length" if len(self.tokens) >= self.limit else None


def decode(
    requests: Sequence[Request], decoder: Decoder, max_running: int, counters: Counters | None = None
) -> list[Response]:
    """Responses to `requests`, in their order.

    Args:
        requests: checked ones (`requests.check`); equal prompts should be neighbours, prompts that begin alike too.
        max_running: rows decoded together.
        counters: added to.

    Raises:
        EngineError: the model's logits are not finite.
    """
    batch = _Batch(requests, decoder, max_running, counters or Counters())
    while batch.step():
        pass
    return [response for response in batch.responses if response is not None]


class _Batch:
    def __init__(self, requests: Sequence[Request], decoder: Decoder, max_running: int, counters: Counters) -> None:
        self.requests, self.decoder, self.max_running, self.counters = requests, decoder, max_running, counters
        self.responses: list[Response | None] = [None] * len(requests)
        self.cache = SharedPromptCache()
        self.rows: list[_Row] = []
        self.slots: list[_Prompt] = []  # prompts in the cache, by slot
        self.latest: _Prompt | None = None  # prompt prefilled last
        self.plan: DecodePlan | None = None  # None: rows or slots have changed
        unique: dict[tuple[int, ...], list[int]] = {}
        for index, request in enumerate(requests):
            unique.setdefault(request.prompt_ids, []).append(index)
        self.queue = deque(_Prompt(ids, deque(members), len(members)) for ids, members in unique.items())

    def step(self) -> bool:
        """Let waiting requests in, then sample one token of every row; False once all is done."""
        free = self.max_running - len(self.rows)
        # Entering a few at a time would mean many small prefills.
        if self.queue and (not self.rows or free >= max(1, self.max_running // 4)):
            self._admit(free)
        elif self.rows:
            self._decode()
        return bool(self.queue or self.rows)

    def _admit(self, free: int) -> None:
        """Give rows to the next `free` requests, and their first token, which the prompt alone decides."""
        entering: list[_Row] = []
        fresh: list[_Prompt] = []
        while self.queue and len(entering) < free:
            prompt = self.queue[0]
            if prompt.slot < 0:
                prompt.slot = len(self.slots)
                self.slots.append(prompt)
                fresh.append(prompt)
            while prompt.waiting and len(entering) < free:
                entering.append(self._row(prompt.waiting.popleft(), prompt))
            if not prompt.waiting:
                self.queue.popleft()
        self._prefill(fresh)
        firsts = [row.prompt.logits for row in entering if row.prompt.logits is not None]
        for row in entering:
            if not row.prompt.waiting:
                row.prompt.logits = None
        self.rows += entering
        self.plan = None
        self._take(torch.stack(firsts), len(self.rows) - len(entering))

    def _row(self, index: int, prompt: _Prompt) -> _Row:
        request = self.requests[index]
        limit = min(request.params.max_new_tokens, self.decoder.max_positions - len(prompt.ids))
        return _Row(index, request, prompt, limit, uniforms(request.params.seed))

    def _prefill(self, prompts: Sequence[_Prompt]) -> None:
        """Bring `prompts` into the cache, in forwards of at most `PREFILL_TOKENS` new tokens."""
        if not prompts:
            return
        self.cache.prompts.reserve(len(self.slots), max(len(prompt.ids) for prompt in prompts))
        pieces: list[Piece] = []
        tails: list[tuple[int, ...]] = []
        pending = 0
        for place, prompt in enumerate(prompts):
            parent = self.latest
            shared = _common_prefix(parent.ids, prompt.ids) if parent is not None and parent.slot >= 0 else 0
            piece = Piece(prompt.slot, parent.slot if shared and parent else 0, shared, len(prompt.ids))
            if pieces and pending + piece.length - shared > PREFILL_TOKENS:
                self._forward_pieces(pieces, tails)
                pieces, tails, pending = [], [], 0
            pieces.append(piece)
            tails.append(prompt.ids[shared:])
            pending += piece.length - shared
            self.latest = prompt
            if place == len(prompts) - 1:
                self._forward_pieces(pieces, tails)

    def _forward_pieces(self, pieces: Sequence[Piece], tails: Sequence[tuple[int, ...]]) -> None:
        device = self.decoder.device
        self.cache.plan = PrefillPlan(pieces, device)
        ids = torch.tensor([token for tail in tails for token in tail], device=device)
        positions = torch.cat([torch.arange(piece.shared, piece.length) for piece in pieces]).to(device)
        lasts = torch.tensor([len(tail) for tail in tails]).cumsum(0).sub_(1).to(device)
        logits = self.decoder.logits(self.cache, ids, positions, lasts)
        for piece, row in zip(pieces, logits, strict=True):
            self.slots[piece.slot].logits = row
        self.counters.prefilled_tokens += ids.shape[0]
        self.counters.prompt_tokens += sum(piece.length for piece in pieces)

    def _decode(self) -> None:
        """Feed every row its latest token and sample the next."""
        device = self.decoder.device
        if self.plan is None:
            slots, lengths = [row.prompt.slot for row in self.rows], [len(prompt.ids) for prompt in self.slots]
            self.plan = DecodePlan(slots, lengths, device)
            self.params = RowParams.of([row.request.params for row in self.rows], self.decoder.vocab_size, device)
        written = [len(row.tokens) - 1 for row in self.rows]
        positions = self.plan.at(written)
        self.cache.rows.reserve(len(self.rows), self.plan.longest_row)
        self.cache.plan = self.plan
        ids = torch.tensor([row.tokens[-1] for row in self.rows], device=device)
        logits = self.decoder.logits(self.cache, ids, positions, None)
        self.counters.decode_steps += 1
        self._take(logits, 0, self.params)

    def _take(self, logits: Tensor, start: int, params: RowParams | None = None) -> None:
        """Sample the next token of the rows from `start` on, and let those that are done leave."""
        rows = self.rows[start:]
        if params is None:
            params = RowParams.of([row.request.params for row in rows], self.decoder.vocab_size, self.decoder.device)
        tokens, logprobs = sample(logits, params, [next(row.draws) for row in rows])
        self.counters.decoded_tokens += len(rows)
        done: list[int] = []
        for place, (row, token, logprob) in enumerate(zip(rows, tokens, logprobs, strict=True), start):
            reason = row.add(token, logprob)
            if reason is not None:
                self.responses[row.index] = Response(tuple(row.tokens), tuple(row.logprobs), reason)
                row.prompt.unfinished -= 1
                done.append(place)
        if done:
            self._leave(done)

    def _leave(self, done: Sequence[int]) -> None:
        """Close the gaps of the rows `done`, and of prompts that nobody needs any more."""
        self.plan = None
        written = max(len(row.tokens) for row in self.rows)
        sources, targets = _fill(self.rows, done)
        if sources and self.cache.rows.layers:
            # Rows that have entered just now have nothing stored yet; copying what stands there does no harm.
            self.cache.rows.reserve(len(self.rows) + len(done), written)
            self.cache.rows.move(sources, targets, written)
        gone = [slot for slot, prompt in enumerate(self.slots) if not prompt.unfinished]
        if not gone:
            return
        longest = max(len(prompt.ids) for prompt in self.slots)
        for slot in gone:
            self.slots[slot].slot = -1
        sources, targets = _fill(self.slots, gone)
        for target in targets:
            self.slots[target].slot = target
        if sources:
            self.cache.prompts.move(sources, targets, longest)


def _fill(items: list, gaps: Sequence[int]) -> tuple[list[int], list[int]]:
    """Remove the places `gaps` (ascending) from `items` by moving its last ones there; which moved, and where to."""
    size, missing = len(items) - len(gaps), set(gaps)
    sources = [place for place in range(size, len(items)) if place not in missing]
    targets = [place for place in gaps if place < size]
    for source, target in zip(sources, targets, strict=True):
        items[target] = items[source]
    del items[size:]
    return sources, targets


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens that both begin with; always leaves at least one of `second`."""
    most = min(len(first), len(second) - 1)
    return next((place for place in range(most) if first[place] != second[place]), most)
