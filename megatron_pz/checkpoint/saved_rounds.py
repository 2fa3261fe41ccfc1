"""A finished round, told again from its records: no server, no model, no corpus."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_pz.checkpoint.completion_lines import completions, read_lines, request_key
from megatron_pz.checkpoint.journal import CompletionJournal, Place
from megatron_pz.errors import CheckpointError
from megatron_pz.tasks.base import Task
from megatron_pz.tasks.together import together
from megatron_pz.types import Completion, Paragraph, Rollout, SamplingParams


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
    def read(journal: CompletionJournal, step: int) -> Records:
        """The records of the round of `step`.

        Raises:
            CheckpointError: there are none.
        """
        path = journal.path(step)
        rows: list[dict[str, Any]] = [*read_lines(path)]
        begun = next((row for row in reversed(rows) if "begun" in row), None)
        if begun is None:
            there = sorted(file.name for file in path.parent.glob("step_*.jsonl"))
            raise CheckpointError(
                f"{path} holds no round. {'It has ' + ', '.join(there) if there else 'There is none'} beside it: rounds are "
                "kept from the oldest checkpoint on."
            )
        paragraphs = tuple(Paragraph(*fields) for fields in begun["begun"])
        noted = [row["taken"] for row in rows if "taken" in row and row["weights"] == begun["weights"]]
        taken = noted[-1] if noted else [(step, index) for index in range(len(paragraphs))]
        return Records(
            path,
            step,
            int(begun["seed"]),
            str(begun["weights"]),
            paragraphs,
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


def saved_rollouts(journal: CompletionJournal, step: int, task: Task) -> list[Rollout]:
    """What the round of `step` came to.

    Args:
        task: with the settings of the run.

    Raises:
        CheckpointError: its records are missing, or not complete.
    """
    of_round = Records.read(journal, step)
    steps = {begun for begun, _ in of_round.taken}
    records = {begun: of_round if begun == step else Records.read(journal, begun) for begun in steps}

    async def tell() -> list[list[Rollout]]:
        return await together(
            task.play_paragraph(records[begun].paragraphs[index], index, records[begun], (records[begun].seed, begun))
            for begun, index in of_round.taken
        )

    return [rollout for of_paragraph in asyncio.run(tell()) for rollout in of_paragraph]
