"""Bins, and the micro-batch that a bin makes."""

import numpy as np
from builders import sample
from hypothesis import given
from hypothesis import strategies as st

from megatron_pz.batch.packing import PADDING, micro_batch, pack
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
    packed = micro_batch([sample()], [np.array([0, 0, 1.0, 1.0])], [0])
    assert {name: getattr(packed, name).dtype.name for name in packed.__slots__ if name != "sample_indices"} == {
        "token_ids": "int64",
        "position_ids": "int64",
        "cu_seqlens": "int32",
        "labels": "int64",
        "loss_weights": "float32",
        "advantages": "float32",
        "rollout_log_probs": "float32",
        "is_generator": "bool",
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
