"""A finished round, told again from its records: no server, no model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_pz.checkpoint.completion_lines import completions, read_lines, request_key
from megatron_pz.checkpoint.journal import CompletionJournal, Place
from megatron_pz.errors import CheckpointError
from megatron_pz.tasks.base import Task
from megatron_pz.tasks.together import together
from megatron_pz.types import Completion, Paragraph, Rollout, SamplingParams

Begun = Callable[[int], tuple[int, Sequence[Paragraph]]]
"""The run's seed, and the paragraphs that the round of a step began."""


@dataclass(frozen=True)
class Records:
    """A file of the journal, as an engine that knows these answers only."""

    path: Path
    step: int
    seed: int
    weights: str
    paragraphs: tuple[Paragraph, ...]
    taken: tuple[Place, ...]  # what the round ended with
    answers: Mapping[str, Completion]

    @staticmethod
    def read(journal: CompletionJournal, step: int, begun: Begun) -> Records:
        """The records of the round of `step`.

        Args:
            begun: see `saved_rollouts`.

        Raises:
            CheckpointError: there are none.
        """
        path = journal.path(step)
        rows: list[dict[str, Any]] = [*read_lines(path)]
        kept = [row["weights"] for row in rows if row.keys() == {"weights"}]
        if not kept:
            there = sorted(file.name for file in path.parent.glob("step_*.jsonl"))
            raise CheckpointError(
                f"{path} holds no round. {'It has ' + ', '.join(there) if there else 'There is none'} beside it: rounds are "
                "kept from the oldest checkpoint on."
            )
        noted = next((row for row in reversed(rows) if "begun" in row), None)
        seed, paragraphs = (
            begun(step) if noted is None else (noted["seed"], [Paragraph(*fields) for fields in noted["begun"]])
        )
        ended = [row["taken"] for row in rows if "taken" in row]
        taken = ended[-1] if ended else [(step, index) for index in range(len(paragraphs))]
        return Records(
            path,
            step,
            int(seed),
            str(kept[-1]),
            tuple(paragraphs),
            tuple((int(at), int(index)) for at, index in taken),
            {recorded.key: recorded.completion for recorded in completions(rows)},
        )

    async def __call__(self, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        """`types.Generate`.

        Raises:
            CheckpointError: the request was not answered, or not asked.
        """
        found = self.answers.get(request_key(prompt_ids, params, self.step, self.weights))
        if found is None:
            raise CheckpointError(
                f"{self.path} holds {len(self.answers)} responses, and not one that its round asks for: the round was not "
                "played to its end, or with other settings ([task], [engine], templates, tokenizer) than are given now."
            )
        return found


def saved_rollouts(journal: CompletionJournal, step: int, task: Task, begun: Begun) -> list[Rollout]:
    """What the round of `step` came to.

    Args:
        task: with the settings of the run.
        begun: asked for what the round of a step began, where its records do not say so.

    Raises:
        CheckpointError: its records are missing, or not complete.
    """
    of_round = Records.read(journal, step, begun)
    steps = {at for at, _ in of_round.taken}
    records = {at: of_round if at == step else Records.read(journal, at, begun) for at in steps}

    async def tell() -> list[list[Rollout]]:
        return await together(
            task.play_paragraph(records[at].paragraphs[index], index, records[at], (records[at].seed, at))
            for at, index in of_round.taken
        )

    return [rollout for of_paragraph in asyncio.run(tell()) for rollout in of_paragraph]
