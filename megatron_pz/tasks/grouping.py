"""Rollouts become groups with advantages (paper Eq. 10), and groups without a lesson are marked as dropped."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_pz.config.schema import TaskConfig
from megatron_pz.game.advantages import advantages
from megatron_pz.game.filters import is_informative
from megatron_pz.types import Group, Role, Rollout


def make_groups(rollouts: Sequence[Rollout], config: TaskConfig, step: int) -> list[Group]:
    """Groups in the order in which their first rollout comes."""
    members: dict[tuple[Role, str], list[Rollout]] = {}
    for rollout in rollouts:
        members.setdefault((rollout.role, rollout.group_id), []).append(rollout)
    due = roles_due(config.update, step)
    return [
        Group(
            id=group_id,
            role=role,
            rollouts=tuple(group),
            advantages=advantages([rollout.reward for rollout in group], config.advantage_eps),
            trained=role in due and is_informative([rollout.reward for rollout in group]),
        )
        for (role, group_id), group in members.items()
    ]


def roles_due(update: str, step: int) -> frozenset[Role]:
    """The roles whose groups the update of `step` (from 1) learns from.

    >>> sorted(map(str, roles_due("joint", 1))), [str(*roles_due("alternate", step)) for step in (1, 2, 3)]
    (['mask', 'prediction'], ['mask', 'prediction', 'mask'])
    """
    if update == "joint":
        return frozenset(Role)
    return frozenset({Role.GENERATOR if step % 2 else Role.PREDICTOR})
