"""What a task is, and what it says about its own health.

A task that generates plays a round with an engine it knows only as `generate`, groups what came back, and measures it.
A task of plain text hands out samples. Neither knows torch, Megatron or HTTP.
"""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from typing import Any, Protocol, runtime_checkable

from megatron_pz.game.spans import MASK_REJECT_REASONS
from megatron_pz.types import Generate, Group, Paragraph, Rollout, Sample

Seed = tuple[int, int]
"""(seed of the run, step): all draws of a round derive from it."""


@runtime_checkable
class Task(Protocol):
    """A game: PretrainZero or its random-span baseline."""

    async def play(self, paragraphs: Sequence[Paragraph], generate: Generate, seed: Seed) -> list[Rollout]:
        """All rollouts of one round, rewarded; their order and content do not depend on which response lands first."""
        ...

    def play_paragraph(
        self, paragraph: Paragraph, place: int, generate: Generate, seed: Seed
    ) -> Coroutine[Any, Any, list[Rollout]]:
        """What `play` makes of the paragraph at `place` of its round: `play` is these, one after another."""
        ...

    def groups(self, rollouts: Sequence[Rollout], step: int) -> list[Group]:
        """`rollouts` by prompt, with advantages; `trained` is false where a group is dropped or not due at `step`."""
        ...

    def health(self, groups: Sequence[Group]) -> dict[str, float]:
        """Values of `HEALTH_METRICS` (`rlvr`: and `VERIFIER_METRICS`); one that has nothing to speak of is left out."""
        ...

    def prompt_ids(self, text: str) -> Sequence[int]:
        """The first prompt about a paragraph of this text: what `corpus.paragraphs.select` measures."""
        ...


@runtime_checkable
class TextTask(Protocol):
    """Supervised training: nothing is generated."""

    def samples(self, paragraphs: Sequence[Paragraph], seed: Seed) -> list[Sample]:
        """What the update learns from; `role` is None in each."""
        ...

    def prompt_ids(self, text: str) -> Sequence[int]:
        """The prompt about a paragraph of this text; empty where there is none."""
        ...


HEALTH_METRICS: dict[str, tuple[str, str]] = {
    "reward/mask/mean": ("reward", "mean reward of mask rollouts, invalid ones included (0)"),
    "reward/prediction/mean": (
        "reward",
        "mean reward of predictions: their accuracy on the masks of this round; `format_only`: those with an answer",
    ),
    "mask/valid_rate": ("share", "mask rollouts whose span can be hidden"),
    **{
        f"mask/reject/{reason}": ("rollouts", f"mask rollouts rejected as `{reason}`") for reason in MASK_REJECT_REASONS
    },
    "mask/length_chars": ("characters", "mean length of the hidden text, over masks that were predicted"),
    "mask/length_words": ("words", "mean length of the hidden text, over masks that were predicted"),
    "mask/occurrences": ("places", "mean number of times the hidden text stands in its paragraph"),
    "mask/stop_word_share": ("share", "masks that hide function words only (English)"),
    "mask/whole_word_share": ("share", "masks that cut no word"),
    "mask/distinct_share": ("share", "different answers among the valid masks of one paragraph, mean over paragraphs"),
    "mask/lottery_share": ("share", "masks of one character, of digits, or of function words alone (English)"),
    "mask/visible_share": ("share", "masks whose words still stand in the masked text in another case, or inflected"),
    "groups/one_right_share": ("share", "prediction groups of four or more in which one alone was right"),
    "groups/duplicate_share/mask": ("share", "mask rollouts that repeat another of their group, token for token"),
    "groups/duplicate_share/prediction": ("share", "predictions that repeat another of their group, token for token"),
    "groups/all_wrong_share": ("share", "prediction groups in which nobody was right"),
    "groups/all_right_share": ("share", "prediction groups in which everybody was right"),
    "groups/kept_share/mask": ("share", "mask groups whose rewards differ"),
    "groups/kept_share/prediction": ("share", "prediction groups whose rewards differ"),
    "num_surviving_groups": ("groups", "groups of both roles that the update learns from"),
    "tokens/completion": ("tokens", "mean length of a response"),
    "tokens/completion/mask": ("tokens", "mean length of a mask rollout's response"),
    "tokens/completion/prediction": ("tokens", "mean length of a prediction's response"),
    "truncated_share/mask": ("share", "mask rollouts cut off at the token limit"),
    "truncated_share/prediction": ("share", "predictions cut off at the token limit"),
    "prediction/format_rate": ("share", "predictions with an answer in a box"),
    "prediction/near_miss_rate": ("share", "predictions wrong by case, punctuation or spacing alone"),
}
"""Name -> (unit, meaning) of everything that `Task.health` reports."""

VERIFIER_METRICS: dict[str, tuple[str, str]] = {
    "verifier/right_share": ("share", "verified answers that are right"),
    "verifier/unverified_share": ("share", "responses left out since no verifier gave a verdict"),
    "verifier/length_penalty": ("reward", "mean loss of right answers for their length"),
}
"""What `rlvr` reports beside them."""
