"""A round as rows of `rollouts.jsonl`: one object a rollout, of both roles, dropped groups included."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from megatron_pz.types import Group, Rollout


def journal_rows(groups: Iterable[Group], step: int, weight_version: int | None = None) -> list[dict[str, Any]]:
    """Rows in the order of `groups`; every value is plain JSON.

    Args:
        weight_version: policy version of responses whose engine did not say (`Completion.weight_versions` is empty).
    """
    return [
        _row(rollout, advantage, group.trained, step, weight_version)
        for group in groups
        for rollout, advantage in zip(group.rollouts, group.advantages, strict=True)
    ]


def said(rollout: Rollout) -> dict[str, Any]:
    """What was asked and answered, as every record of a rollout has it."""
    return {
        "prompt": rollout.prompt,
        "response": rollout.response,
        "answer": rollout.answer,
        "target": rollout.target,
        "valid": rollout.valid,
    }


def _row(rollout: Rollout, advantage: float, trained: bool, step: int, weight_version: int | None) -> dict[str, Any]:
    completion = rollout.completion
    return {
        "step": step,
        "role": str(rollout.role),
        "paragraph_id": rollout.paragraph_id,
        "group_id": rollout.group_id,
        "mask_id": rollout.mask_id,
        **said(rollout),
        "reject_reason": rollout.reject_reason,
        "reward": rollout.reward,
        "advantage": advantage,
        "trained": trained,
        "num_tokens": len(completion.token_ids),
        "finish_reason": completion.finish_reason,
        # The version that wrote the last token: a response may outlive a weight sync.
        "weight_version": completion.weight_versions[-1] if completion.weight_versions else weight_version,
    }
