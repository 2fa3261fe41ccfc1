"""Is the game still a game: what `report.metrics` names of it, measured on the groups of one round.

Everything is measured before groups are dropped, except `num_surviving_groups`. A mean over nothing is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean

from megatron_pz.game.answers import Match, is_near_miss
from megatron_pz.game.filters import is_informative
from megatron_pz.game.hints import is_lottery, is_still_visible
from megatron_pz.game.masking import cuts_no_word, restore
from megatron_pz.game.spans import MASK_REJECT_REASONS
from megatron_pz.game.stop_words import is_stop_words
from megatron_pz.types import Group, Mask, Role, Rollout

_FEWEST_DRAWS = 4
"""Of fewer predictions one is right alone too often to mean anything."""


def health(groups: Sequence[Group], match: Match = "strict") -> dict[str, float]:
    """Values by name."""
    by_role = {role: [group for group in groups if group.role is role] for role in Role}
    masks, predictions = by_role[Role.GENERATOR], by_role[Role.PREDICTOR]
    everything = [rollout for group in groups for rollout in group.rollouts]
    values = {
        **_of_role(Role.GENERATOR, masks),
        **_of_role(Role.PREDICTOR, predictions),
        **_of_validity(masks),
        **_of_masks([mask for group in predictions if (mask := group.rollouts[0].mask) is not None]),
        **_of_predictions(predictions, match),
        "tokens/completion": _mean(len(rollout.completion.token_ids) for rollout in everything),
        "num_surviving_groups": float(sum(group.trained for group in groups)),
    }
    return {name: value for name, value in values.items() if value is not None}


def _of_role(role: Role, groups: Sequence[Group]) -> dict[str, float | None]:
    rollouts = _rollouts(groups)
    return {
        f"reward/{role}/mean": _mean(rollout.reward for rollout in rollouts),
        f"groups/kept_share/{role}": _mean(is_informative([r.reward for r in group.rollouts]) for group in groups),
        f"groups/duplicate_share/{role}": _mean(_repeated(group.rollouts) for group in groups),
        f"tokens/completion/{role}": _mean(len(rollout.completion.token_ids) for rollout in rollouts),
        f"truncated_share/{role}": _mean(rollout.completion.finish_reason == "length" for rollout in rollouts),
    }


def _of_validity(groups: Sequence[Group]) -> dict[str, float | None]:
    if not (rollouts := _rollouts(groups)):
        return {}
    rejected = Counter(rollout.reject_reason for rollout in rollouts if not rollout.valid)
    answers = [[rollout.answer for rollout in group.rollouts if rollout.valid] for group in groups]
    return {
        "mask/valid_rate": _mean(rollout.valid for rollout in rollouts),
        **{f"mask/reject/{reason}": float(rejected[reason]) for reason in MASK_REJECT_REASONS},
        "mask/distinct_share": _mean(len(set(group)) / len(group) for group in answers if group),
    }


def _of_masks(masks: Sequence[Mask]) -> dict[str, float | None]:
    return {
        "mask/length_chars": _mean(len(mask.answer) for mask in masks),
        "mask/length_words": _mean(len(mask.answer.split()) for mask in masks),
        "mask/occurrences": _mean(mask.num_occurrences for mask in masks),
        "mask/stop_word_share": _mean(is_stop_words(mask.answer) for mask in masks),
        "mask/lottery_share": _mean(is_lottery(mask.answer) for mask in masks),
        "mask/visible_share": _mean(is_still_visible(mask.answer, mask.masked_text) for mask in masks),
        "mask/whole_word_share": _mean(all(cuts_no_word(restore(mask), span) for span in mask.spans) for mask in masks),
    }


def _of_predictions(groups: Sequence[Group], match: Match) -> dict[str, float | None]:
    rollouts = _rollouts(groups)
    return {
        "groups/all_wrong_share": _mean(all(r.reward <= 0 for r in group.rollouts) for group in groups),
        "groups/all_right_share": _mean(all(r.reward > 0 for r in group.rollouts) for group in groups),
        "groups/one_right_share": _mean(
            sum(r.reward > 0 for r in group.rollouts) == 1 for group in groups if len(group.rollouts) >= _FEWEST_DRAWS
        ),
        "prediction/format_rate": _mean(rollout.valid for rollout in rollouts),
        "prediction/near_miss_rate": _mean(
            rollout.valid and is_near_miss(rollout.answer, rollout.target or "", match) for rollout in rollouts
        ),
    }


def _repeated(rollouts: Sequence[Rollout]) -> float:
    """Share of `rollouts` whose response another said before."""
    return 1 - len({rollout.completion.token_ids for rollout in rollouts}) / len(rollouts)


def _rollouts(groups: Sequence[Group]) -> list[Rollout]:
    return [rollout for group in groups for rollout in group.rollouts]


def _mean(values: Iterable[float]) -> float | None:
    listed = [float(value) for value in values]
    return fmean(listed) if listed else None
