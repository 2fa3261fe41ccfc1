"""What every engine can do. The game sees only `generate`; the main loop sees the rest."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from megatron_pz.types import Completion, SamplingParams

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Conversation(Protocol[T_co]):
    """A round of play or an evaluation that was begun: what `Engine.finish` waits for."""

    @property
    def call(self) -> Callable[[], Awaitable[T_co]]:
        """What is said, on rank 0."""
        ...


class Engine(Protocol):
    """Samples responses. `engine.generate` is a `types.Generate`.

    All ranks call everything but `generate` together. Conversations happen on rank 0: the others help to answer (their
    replica decodes, or hands its weights to a server that was lost) while they are in `finish`.
    """

    @property
    def version(self) -> int:
        """The policy version of the weights that now sample; -1 before the first `load`."""
        ...

    async def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        """One sampled response to `prompt_ids`; only within a conversation.

        Raises:
            EngineError: the request cannot be served, or generation failed.
        """
        ...

    def begin(self, call: Callable[[], Awaitable[T]]) -> Conversation[T]:
        """Begin a conversation; on rank 0 `call()` may run from now on, elsewhere it is never called."""
        ...

    def finish(self, begun: Conversation[T]) -> T | None:
        """What the conversation came to, on rank 0; None elsewhere."""
        ...

    def load(self, weights: Any, version: int) -> None:
        """Sample from `weights` from now on, and stamp tokens with `version`."""
        ...

    def sleep(self) -> None:
        """Leave the accelerator's memory to the trainer, where they share one. Nothing is asked until `wake`."""
        ...

    def wake(self) -> None:
        """Take the memory back; weights are those of the next `load`."""
        ...

    def lap(self) -> Mapping[str, float]:
        """What happened since the last call, by the names of `report.metrics`; empty on ranks other than 0."""
        ...

    def close(self) -> None:
        """Give up what is under way and give back what the engine holds. May be called twice."""
        ...


def converse(engine: Engine, call: Callable[[], Awaitable[T]]) -> T | None:
    """Result of `call()` on rank 0, with whose requests every rank helps; None on the other ranks."""
    return engine.finish(engine.begin(call))
