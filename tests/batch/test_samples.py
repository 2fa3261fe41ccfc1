"""Rewarded groups made trainable."""

from dataclasses import replace

import numpy as np
import pytest
from builders import group, rollout

from megatron_pz.batch.samples import to_samples
from megatron_pz.errors import EngineError
from megatron_pz.types import Completion, Role


def _group(role: Role, group_id: str = "1.0.0"):
    return group([rollout(role, 1.0, group_id=group_id), rollout(role, 0.0, group_id=group_id)])


def test_the_response_carries_the_weight_and_the_engine_s_log_probs_and_the_prompt_none():
    made = replace(rollout(), completion=Completion((5, 9), (7, 1), (-0.3, -0.1), "stop"))
    pair = group([made, rollout(reward=0.0)])

    sample = to_samples([pair], predictor_weight=0.5)[0]

    assert sample.token_ids == (5, 9, 7, 1)
    assert sample.loss_weights == (0, 0, 0.5, 0.5)
    assert sample.rollout_log_probs == (0, 0, -0.3, -0.1)
    assert sample.role is Role.PREDICTOR
    assert sample.group_id == pair.id


def test_advantages_follow_their_rollouts():
    pair = _group(Role.PREDICTOR)
    assert [s.advantage for s in to_samples([pair])] == list(pair.advantages)
    assert pair.advantages[0] > 0 > pair.advantages[1]


def test_only_trained_groups_give_samples_and_in_their_order():
    masks, predictions = _group(Role.GENERATOR, "a"), _group(Role.PREDICTOR, "b")
    dropped = replace(_group(Role.PREDICTOR, "c"), trained=False)
    assert [s.group_id for s in to_samples([masks, dropped, predictions])] == ["a", "a", "b", "b"]


def test_each_role_has_its_weight_and_a_role_of_weight_zero_is_left_out():
    groups = [_group(Role.GENERATOR), _group(Role.PREDICTOR)]
    samples = to_samples(groups, generator_weight=3.0, predictor_weight=0.25)
    assert [max(s.loss_weights) for s in samples] == [3.0, 3.0, 0.25, 0.25]
    assert {s.role for s in to_samples(groups, generator_weight=0.0)} == {Role.PREDICTOR}


def test_a_response_without_tokens_gives_no_sample():
    empty = replace(rollout(reward=0.0), completion=Completion((5, 9), (), (), "abort"))
    assert len(to_samples([group([rollout(), empty])])) == 1


def test_the_experts_of_a_response_are_handed_on_and_samples_stay_comparable():
    experts = np.arange(12, dtype=np.int32).reshape(3, 2, 2)
    routed = replace(rollout(), completion=Completion((5, 9), (7, 1), (-0.3, -0.1), "stop", (), experts))
    known, unknown = to_samples([group([routed, rollout(reward=0.0)])])
    assert known.routed_experts.dtype == np.int16 and np.array_equal(known.routed_experts, experts)
    assert unknown.routed_experts is None
    assert known == replace(known, routed_experts=experts + 1)


@pytest.mark.parametrize("shape", [(1, 2, 2), (4, 2, 2), (3, 4)])
def test_experts_of_other_tokens_than_the_response_s_are_told(shape):
    experts = np.zeros(shape, np.int32)  # one row would fit any length, by numpy's rules
    routed = replace(rollout(), completion=Completion((5, 9), (7, 1), (-0.3, -0.1), "stop", (), experts))
    with pytest.raises(EngineError, match=r"2 tokens and a response of 2 have \[3, layers"):
        to_samples([group([routed, rollout(reward=0.0)])])
