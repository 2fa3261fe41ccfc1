"""The record of completions between game and servers: what a killed run generated is read back, not generated again.

The embedded engine has none: it samples the same tokens again in less time than a disk needs to keep them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from megatron_pz.checkpoint.journal import JOURNAL_FOLDER, CompletionJournal
from megatron_pz.checkpoint.weights_digest import weights_digest
from megatron_pz.config.schema import EngineConfig
from megatron_pz.tasks.stragglers import Place
from megatron_pz.types import Generate


class Record(Protocol):
    """What a killed trainer finds of the round that it was in."""

    def keep(self, generate: Generate, step: int, version: int) -> Generate:
        """See `train.play.Keep`."""
        ...

    def taken(self, step: int) -> Sequence[Place] | None:
        """See `tasks.stragglers.Stragglers`."""
        ...

    def note_taken(self, step: int, taken: Sequence[Place]) -> None: ...

    def prune(self, steps: Sequence[int]) -> None:
        """Checkpoints of `steps` are kept: what no resume can reach goes."""
        ...

    def close(self) -> None: ...


class NoRecord:
    """Nothing is recorded."""

    def keep(self, generate: Generate, step: int, version: int) -> Generate:
        return generate

    def taken(self, step: int) -> Sequence[Place] | None:
        return None

    def note_taken(self, step: int, taken: Sequence[Place]) -> None:
        """Forget it."""

    def prune(self, steps: Sequence[int]) -> None:
        """There is nothing."""

    def close(self) -> None:
        """Nothing is held."""


class ServerRecord:
    """What servers answered, in `journal/` of the run directory. On rank 0.

    Where rounds are played in turns with updates, an answer counts again only under weights that are equal to the bit;
    where they overlap, under versions that are as near as the run allows.
    """

    def __init__(self, run_dir: Path, chunks: Sequence[torch.nn.Module], engine: EngineConfig) -> None:
        self._journal = CompletionJournal(run_dir / JOURNAL_FOLDER)
        self._chunks = chunks
        self._overlap = engine.async_steps + int(engine.stragglers == "continue")

    def keep(self, generate: Generate, step: int, version: int) -> Generate:
        if self._overlap:
            near = (max(0, version - self._overlap), version + self._overlap)
            return self._journal.keep(generate, step, versions=near)
        return self._journal.keep(generate, step, weights=weights_digest(self._chunks), versions=(version, version))

    def taken(self, step: int) -> Sequence[Place] | None:
        return self._journal.taken(step)

    def note_taken(self, step: int, taken: Sequence[Place]) -> None:
        self._journal.note_taken(step, taken)

    def prune(self, steps: Sequence[int]) -> None:
        if steps:
            self._journal.prune(min(steps))

    def close(self) -> None:
        self._journal.close()
