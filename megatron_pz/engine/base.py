"""What every engine can do. The game sees only `generate`; the main loop sees the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from megatron_pz.types import Completion, SamplingParams


class Engine(Protocol):
    """Samples responses. `engine.generate` is a `types.Generate`.

    Rank 0 calls `generate` and, when its conversation is over, `release_followers`; meanwhile every other rank is in
    `follow`. All ranks call `load` and `close` together.
    """

    @property
    def version(self) -> int:
        """The policy version of the weights that now sample; -1 before the first `load`."""
        ...

    async def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        """One sampled response to `prompt_ids`.

        Raises:
            EngineError: the request cannot be served, or generation failed.
        """
        ...

    def follow(self) -> None:
        """On ranks other than 0: help to generate until rank 0 releases its followers."""
        ...

    def release_followers(self) -> None:
        """On rank 0: let the other ranks go on."""
        ...

    def load(self, weights: Any, version: int) -> None:
        """Sample from `weights` from now on, and stamp tokens with `version`. No request may be under way."""
        ...

    async def drain(self) -> None:
        """Return once no request is under way."""
        ...

    def close(self) -> None:
        """Give back what the engine holds."""
        ...
