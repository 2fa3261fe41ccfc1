"""Where a run stands, apart from the weights: what the next step needs to be the step it would have been."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RunState:
    """Counted from the beginning of the run. Random numbers are functions of (seed, step), so no generator is kept.

    >>> RunState(seed=1).advance(8, updated=True)
    RunState(seed=1, step=1, position=8, policy_version=1, left=())
    """

    seed: int
    step: int = 0  # completed steps
    position: int = 0  # paragraphs drawn
    policy_version: int = 0  # updates applied
    left: tuple[tuple[int, int], ...] = ()  # paragraphs that go on in the next round: (step that began it, index there)

    def advance(self, num_paragraphs: int, *, updated: bool, left: Sequence[tuple[int, int]] = ()) -> RunState:
        """The state after one more step."""
        return dataclasses.replace(
            self,
            step=self.step + 1,
            position=self.position + num_paragraphs,
            policy_version=self.policy_version + int(updated),
            left=tuple(left),
        )

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> RunState:
        """The state that `to_json` wrote."""
        fields: dict[str, Any] = json.loads(text)
        left = tuple((step, index) for step, index in fields.pop("left", ()))
        return RunState(**fields, left=left)
