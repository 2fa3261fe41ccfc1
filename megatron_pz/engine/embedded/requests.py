"""What is asked of the embedded engine, in a form that travels between ranks; and who answers what."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_pz.errors import EngineError
from megatron_pz.types import Completion, FinishReason, SamplingParams


@dataclass(frozen=True, slots=True)
class Request:
    """One response wanted."""

    prompt_ids: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Response:
    """One response sampled."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason

    def completion(self, request: Request, version: int) -> Completion:
        """The response as the game gets it; all its tokens come from one version of the weights."""
        versions = (version,) * len(self.token_ids)
        return Completion(request.prompt_ids, self.token_ids, self.logprobs, self.finish_reason, versions)


def check(request: Request, vocab_size: int, max_positions: int) -> None:
    """Refuse what cannot be sampled, with the numbers.

    Args:
        vocab_size: ids are below it.
        max_positions: tokens that the model can have in a row.

    Raises:
        EngineError: prompt or params are out of range.
    """
    prompt, params = request.prompt_ids, request.params
    if not prompt:
        raise EngineError("The prompt is empty; a model needs at least one token to go on from.")
    if len(prompt) >= max_positions:
        raise EngineError(
            f"The prompt has {len(prompt)} tokens; the model's max_position_embeddings is {max_positions}, which leaves "
            "no room for a response. Lower --max-prompt-tokens."
        )
    low, high = min(prompt), max(prompt)
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise EngineError(
            f"The prompt holds token id {bad}; the model's vocabulary has ids 0 to {vocab_size - 1}. "
            "Use the tokenizer that belongs to the model."
        )
    if params.max_new_tokens < 1:
        raise EngineError(f"max_new_tokens is {params.max_new_tokens}; it must be at least 1.")
    if not (params.temperature >= 0 and math.isfinite(params.temperature)):
        raise EngineError(f"temperature is {params.temperature}; it must be 0 (greedy) or positive.")
    if not 0 < params.top_p <= 1:
        raise EngineError(f"top_p is {params.top_p}; it must be over 0 and at most 1 (off).")
    if params.top_k < 0:
        raise EngineError(f"top_k is {params.top_k}; it must be 0 (off) or positive.")


def shares(prompts: Sequence[Sequence[int]], num_shares: int) -> list[list[int]]:
    """Indices of `prompts` for each of `num_shares` replicas, in the order in which each shall answer them.

    Prompts are sorted, so that equal ones are neighbours on one replica and those that begin alike mostly are; the
    sorted list is cut where the costs are about equal. A prompt costs its length once, and a little for each response.

    >>> shares([(5, 6), (1, 2), (5, 6), (1, 3)], 2)
    [[1, 3], [0, 2]]
    """
    order = sorted(range(len(prompts)), key=lambda index: (tuple(prompts[index]), index))
    costs: list[int] = []  # of each run of equal prompts
    ends: list[int] = []
    for place, index in enumerate(order):
        if place and prompts[order[place - 1]] == prompts[index]:
            costs[-1] += RESPONSE_COST
            ends[-1] = place + 1
        else:
            costs.append(len(prompts[index]) + RESPONSE_COST)
            ends.append(place + 1)
    total, before, start = sum(costs), 0, 0
    found: list[list[int]] = [[] for _ in range(num_shares)]
    for cost, end in zip(costs, ends, strict=True):
        middle = (2 * before + cost) * num_shares // (2 * total)
        found[min(middle, num_shares - 1)] += order[start:end]
        before, start = before + cost, end
    return found


RESPONSE_COST = 32
"""Prompt tokens that are about as much work as one response of the game."""


def replicas(partners: Iterable[Iterable[int]]) -> list[tuple[int, ...]]:
    """Sets of ranks that must run every forward together, from the ranks that each rank communicates with in one.

    Sets that overlap are one replica. Sorted by smallest rank.

    >>> replicas([{0, 1}, {0, 1}, {2, 3}, {2, 3}])
    [(0, 1), (2, 3)]
    >>> replicas([{0, 1, 2}, {1, 0, 3}, {2, 0}, {3, 1}])
    [(0, 1, 2, 3)]
    """
    merged: list[set[int]] = []
    for group in map(set, partners):
        apart = [other for other in merged if not other & group]
        merged = [*apart, group.union(*(other for other in merged if other & group))]
    return sorted(tuple(sorted(group)) for group in merged)
