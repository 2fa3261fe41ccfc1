"""Bins, and the micro-batch that a bin makes."""

from dataclasses import replace

import numpy as np
import pytest
from builders import sample
from hypothesis import given
from hypothesis import strategies as st

from megatron_pz.batch.packing import OWN_CHOICE, PADDING, micro_batch, pack
from megatron_pz.types import Role

lengths_and_budget = st.tuples(st.lists(st.integers(1, 60), max_size=60), st.integers(1, 80))


@given(lengths_and_budget)
def test_packing_places_each_sample_once_and_within_the_budget(case):
    lengths, budget = case
    bins = pack(lengths, budget)
    assert sorted(index for indices in bins for index in indices) == list(range(len(lengths)))
    for indices in bins:
        assert len(indices) == 1 or sum(lengths[i] for i in indices) <= budget


@given(lengths_and_budget)
def test_no_two_bins_could_be_one(case):
    lengths, budget = case
    sizes = [sum(lengths[i] for i in indices) for indices in pack(lengths, budget)]
    assert all(a + b > budget for n, a in enumerate(sizes) for b in sizes[n + 1 :])


def test_a_sample_longer_than_the_budget_goes_alone():
    assert pack([3, 20, 4], 8) == [[1], [2, 0]]


def test_a_packed_micro_batch_by_hand():
    first = sample((5, 9), (7, 1), advantage=2.0, role=Role.GENERATOR, log_prob=-0.5)
    second = sample((4,), (8, 3), advantage=-1.0, log_prob=-0.25)
    weights = [np.array([0, 0, 0.5, 0.75]), np.array([0, 1.5, 1.25])]

    packed = micro_batch([first, second], weights, [1, 0], align=4)

    assert packed.token_ids.tolist() == [4, 8, 3, 5, 9, 7, 1, 0]
    assert packed.position_ids.tolist() == [0, 1, 2, 0, 1, 2, 3, 0]
    assert packed.cu_seqlens.tolist() == [0, 3, 7, 8]
    assert packed.labels.tolist() == [8, 3, 0, 9, 7, 1, 0, 0]
    assert packed.loss_weights.tolist() == [1.5, 1.25, 0, 0, 0.5, 0.75, 0, 0]
    assert packed.advantages.tolist() == [-1, -1, 0, 2, 2, 2, 0, 0]
    assert packed.rollout_log_probs.tolist() == [-0.25, -0.25, 0, 0, -0.5, -0.5, 0, 0]
    assert packed.is_generator.tolist() == [False] * 3 + [True] * 3 + [False] * 2
    assert packed.sample_indices == (1, 0, PADDING)
    assert packed.num_tokens == 8


def test_the_dtypes_are_those_of_the_record():
    routed = replace(sample(), routed_experts=np.zeros((3, 1, 1), np.int16))
    packed = micro_batch([routed], [np.array([0, 0, 1.0, 1.0])], [0])
    assert {name: getattr(packed, name).dtype.name for name in packed.__slots__ if name != "sample_indices"} == {
        "token_ids": "int64",
        "position_ids": "int64",
        "cu_seqlens": "int32",
        "labels": "int64",
        "loss_weights": "float32",
        "advantages": "float32",
        "rollout_log_probs": "float32",
        "is_generator": "bool",
        "routed_experts": "int16",
    }


def test_what_needs_no_padding_has_none():
    packed = micro_batch([sample()], [np.ones(4)], [0], align=2)
    assert packed.sample_indices == (0,)
    assert packed.cu_seqlens.tolist() == [0, 4]


def test_a_micro_batch_of_nothing_is_padding_that_is_not_trained():
    packed = micro_batch([], [], [], align=2)
    assert packed.cu_seqlens.tolist() == [0, 2]
    assert packed.sample_indices == (PADDING,)
    assert not packed.loss_weights.any()


def experts(num_tokens, start):
    """Experts of a sample of `num_tokens`, 2 layers with 3 a token: every number another."""
    return np.arange(start, start + (num_tokens - 1) * 6, dtype=np.int16).reshape(num_tokens - 1, 2, 3)


def test_experts_stand_at_the_token_that_was_sent_to_them_and_are_free_where_nothing_is_known():
    first, unknown = replace(sample((5, 9), (7,)), routed_experts=experts(3, 100)), sample((4,), (8,))
    last = replace(sample((3,), (6,)), routed_experts=experts(2, 200))

    packed = micro_batch([first, unknown, last], [np.zeros(3), np.zeros(2), np.zeros(2)], [0, 1, 2], align=8)

    assert packed.token_ids.tolist() == [5, 9, 7, 4, 8, 3, 6, 0]
    assert packed.routed_experts.shape == (8, 2, 3)
    assert packed.routed_experts[:2].tolist() == first.routed_experts.tolist()
    assert packed.routed_experts[5].tolist() == [[200, 201, 202], [203, 204, 205]]
    assert (packed.routed_experts[[2, 3, 4, 6, 7]] == OWN_CHOICE).all()  # ends, a sample without, padding


def test_without_experts_a_micro_batch_has_none():
    assert micro_batch([sample()], [np.zeros(4)], [0], align=3).routed_experts is None
    assert micro_batch([], [], [], align=2).routed_experts is None


def test_experts_of_another_length_than_the_sample_are_refused():
    wrong = replace(sample(), routed_experts=experts(5, 0))
    with pytest.raises(ValueError, match="broadcast"):
        micro_batch([wrong], [np.zeros(4)], [0])
