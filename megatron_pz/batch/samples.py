"""Rewarded groups made trainable: the response's tokens carry the loss, the prompt's do not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_pz.errors import EngineError
from megatron_pz.types import Completion, Group, Role, Sample


def to_samples(
    groups: Sequence[Group], *, generator_weight: float = 1.0, predictor_weight: float = 1.0
) -> list[Sample]:
    """One sample for each rollout of the groups that are trained, in their order.

    A role of weight 0 is left out, as is a response without a token: neither would change a gradient.

    Args:
        groups: of both roles; those with `trained` false are passed over.
        generator_weight: loss weight of mask-generation tokens.
        predictor_weight: loss weight of mask-prediction tokens.

    Raises:
        EngineError: routed experts are not those of a response's tokens.

    Source: docs/paper.md 2.7, with a weight for each role.
    """
    weights = {Role.GENERATOR: generator_weight, Role.PREDICTOR: predictor_weight}
    return [
        sample_of(
            rollout.completion,
            role=rollout.role,
            group_id=group.id,
            advantage=advantage,
            weight=weights[group.role],
        )
        for group in groups
        if group.trained and weights[group.role] > 0
        for rollout, advantage in zip(group.rollouts, group.advantages, strict=True)
        if rollout.completion.token_ids
    ]


def sample_of(
    completion: Completion, *, role: Role | None, group_id: str, advantage: float = 0.0, weight: float = 1.0
) -> Sample:
    """`completion` made trainable, every token of the response with `weight`.

    Raises:
        EngineError: routed experts are not those of its tokens.
    """
    prompt_zeros = (0.0,) * len(completion.prompt_ids)
    return Sample(
        token_ids=(*completion.prompt_ids, *completion.token_ids),
        loss_weights=(*prompt_zeros, *(weight for _ in completion.token_ids)),
        rollout_log_probs=(*prompt_zeros, *completion.logprobs),
        advantage=advantage,
        role=role,
        group_id=group_id,
        routed_experts=_routed_experts(completion),
    )


def _routed_experts(completion: Completion) -> np.ndarray | None:
    """int16 [tokens - 1, layers, top_k]; None if the engine does not tell."""
    if completion.routed_experts is None:
        return None
    # The smallest type with room for any model's experts: a step has gigabytes of them.
    experts = np.asarray(completion.routed_experts, np.int16)
    wanted = len(completion.prompt_ids) + len(completion.token_ids) - 1
    if experts.ndim != 3 or len(experts) != wanted:
        raise EngineError(
            f"The engine tells routed experts of shape {list(experts.shape)}; a prompt of {len(completion.prompt_ids)} tokens "
            f"and a response of {len(completion.token_ids)} have [{wanted}, layers, experts a token]."
        )
    return experts
