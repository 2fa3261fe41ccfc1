"""A round, paragraph by paragraph: which mask to show, and the predictions for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_pz.types import Group, Role, Rollout

MASK_TOKEN = "[mask]"  # as in `game.masking`, a room above this one


@dataclass(frozen=True, slots=True)
class Game:
    """One paragraph with one of its masks. `mask` is None where chance chose the span; `spans` is empty without one."""

    paragraph_id: str
    text: str  # of the paragraph; empty where no mask of it was valid
    spans: tuple[tuple[int, int], ...]  # (start, end) in characters
    mask: Rollout | None
    predictions: tuple[Rollout, ...]


def games_of(groups: Sequence[Group]) -> list[Game]:
    """A game for each paragraph of the round, in order: the mask that earned most, the first of equals."""
    mask_groups = [group for group in groups if group.role is Role.GENERATOR]
    predictions = {group.id: group.rollouts for group in groups if group.role is Role.PREDICTOR}
    if mask_groups:
        return [_of_mask_group(group, predictions) for group in mask_groups]
    chosen: dict[str, tuple[Rollout, ...]] = {}
    for rollouts in predictions.values():
        chosen.setdefault(rollouts[0].paragraph_id, rollouts)
    return [_game(None, rollouts) for rollouts in chosen.values()]


def _of_mask_group(group: Group, predictions: dict[str, tuple[Rollout, ...]]) -> Game:
    best = max(group.rollouts, key=lambda rollout: (rollout.valid, rollout.reward))
    return _game(best, predictions.get(best.mask_id, ()))


def _game(mask_rollout: Rollout | None, predictions: tuple[Rollout, ...]) -> Game:
    shown = mask_rollout or predictions[0]
    mask = shown.mask
    if mask is None:
        return Game(shown.paragraph_id, "", (), mask_rollout, predictions)
    text = mask.masked_text.replace(MASK_TOKEN, mask.answer)
    return Game(shown.paragraph_id, text, mask.spans, mask_rollout, predictions)
