"""The invariants of a plan, numbered as in batch/schedule.py, over random samples, budgets and layouts."""

import numpy as np
import pytest
from builders import sample
from hypothesis import given
from hypothesis import strategies as st

from megatron_pz.batch.hand import dealt
from megatron_pz.batch.packing import PADDING
from megatron_pz.batch.schedule import plan_update, scales_of
from megatron_pz.types import Role


@st.composite
def samples_of_a_step(draw, min_size=1):
    """Prompts and responses of distinct tokens, so that a token at a wrong place is seen."""
    made, token = [], 1
    for prompt, response, weight in draw(
        st.lists(
            st.tuples(st.integers(1, 12), st.integers(1, 12), st.sampled_from([0.25, 1.0, 3.0])),
            min_size=min_size,
            max_size=24,
        )
    ):
        ids = range(token, token + prompt + response)
        token += len(ids)
        made.append(sample(ids[:prompt], ids[prompt:], weight=weight, advantage=float(token)))
    return made


def scaled_weights(samples, loss_aggregation):
    scales, num_tokens = scales_of(samples, loss_aggregation)
    return [dealt(one, scale).loss_weights for one, scale in zip(samples, scales, strict=True)], num_tokens


plans = st.fixed_dictionaries(
    {
        "max_tokens": st.integers(1, 64),
        "dp_size": st.integers(1, 5),
        "align": st.integers(1, 4),
        "loss_aggregation": st.sampled_from(["token_mean", "sequence_mean"]),
    }
)


def _batches(plan):
    return [batch for rank in plan.micro_batches for batch in rank]


def _sequences(batch):
    return list(zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], batch.sample_indices, strict=True))


@given(samples_of_a_step(), plans)
def test_1_each_sample_is_packed_once_with_its_own_tokens(samples, settings):
    plan = plan_update(samples, **settings)
    seen = []
    for batch in _batches(plan):
        for start, end, index in _sequences(batch):
            if index != PADDING:
                seen.append(index)
                assert tuple(batch.token_ids[start:end]) == samples[index].token_ids
                assert (batch.advantages[start : end - 1] == samples[index].advantage).all()
    assert sorted(seen) == list(range(len(samples)))
    assert plan.num_samples == len(samples)


@given(samples_of_a_step(), plans)
def test_2_ranks_have_equally_many_micro_batches_each_aligned_and_within_the_budget(samples, settings):
    plan = plan_update(samples, **settings)
    assert len(plan.micro_batches) == settings["dp_size"]
    assert len({len(rank) for rank in plan.micro_batches}) == 1
    for batch in _batches(plan):
        assert batch.num_tokens % settings["align"] == 0
        real = [index for index in batch.sample_indices if index != PADDING]
        tokens = sum(len(samples[index].token_ids) for index in real)
        assert len(real) <= 1 or tokens <= settings["max_tokens"]
        assert batch.num_tokens - tokens < settings["align"] or not real


@given(samples_of_a_step(), plans)
def test_2_ranks_differ_by_at_most_the_longest_sample(samples, settings):
    plan = plan_update(samples, **settings | {"align": 1})
    tokens = [
        sum(len(samples[i].token_ids) for batch in rank for i in batch.sample_indices if i != PADDING)
        for rank in plan.micro_batches
    ]
    assert max(tokens) - min(tokens) <= max(len(s.token_ids) for s in samples)


@given(samples_of_a_step(), plans)
def test_3_loss_weights_add_up_to_the_count_of_trained_tokens(samples, settings):
    plan = plan_update(samples, **settings)
    weights = np.concatenate([batch.loss_weights for batch in _batches(plan)])
    assert plan.num_tokens == np.count_nonzero(weights) == sum(np.count_nonzero(s.loss_weights) for s in samples)
    assert weights.sum(dtype=np.float64) == pytest.approx(plan.num_tokens, rel=1e-6)  # float32 weights


@given(samples_of_a_step(), plans)
def test_labels_are_the_next_token_of_the_same_sequence(samples, settings):
    for batch in _batches(plan_update(samples, **settings)):
        for start, end in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
            assert (batch.labels[start : end - 1] == batch.token_ids[start + 1 : end]).all()
            assert batch.position_ids[start:end].tolist() == list(range(end - start))
            last = end - 1
            assert (batch.labels[last], batch.loss_weights[last], batch.advantages[last]) == (0, 0, 0)


@given(samples_of_a_step(), plans, plans)
def test_a_sample_s_weights_do_not_depend_on_packing_or_layout(samples, one, other):
    def weights_of(settings):
        plan = plan_update(samples, **settings | {"loss_aggregation": "sequence_mean"})
        return {
            index: tuple(batch.loss_weights[start:end])
            for batch in _batches(plan)
            for start, end, index in _sequences(batch)
            if index != PADDING
        }

    assert weights_of(one) == weights_of(other)


def test_token_mean_keeps_the_ratio_of_role_weights_by_hand():
    # 1 token of weight 3 and 2 of weight 1: scaled by 3 / (3 + 1 + 1) = 0.6.
    samples = [sample((5,), (6,), weight=3.0, role=Role.GENERATOR), sample((5,), (6, 7), weight=1.0)]
    weights, num_tokens = scaled_weights(samples, "token_mean")
    assert num_tokens == 3
    assert weights[0].tolist() == pytest.approx([0, 1.8])
    assert weights[1].tolist() == pytest.approx([0, 0.6, 0.6])


def test_sequence_mean_gives_each_sequence_its_weight_whatever_its_length_by_hand():
    # Means 3 and 1 of two sequences: 3 tokens are shared 3 : 1, so 2.25 on the one token, 0.375 on each of the two.
    samples = [sample((5,), (6,), weight=3.0), sample((5,), (6, 7), weight=1.0)]
    weights, _ = scaled_weights(samples, "sequence_mean")
    assert weights[0].tolist() == pytest.approx([0, 2.25])
    assert weights[1].tolist() == pytest.approx([0, 0.375, 0.375])


def test_the_first_token_of_a_sequence_is_not_trained():
    weights, num_tokens = scaled_weights([sample((), (6, 7))], "token_mean")
    assert (weights[0].tolist(), num_tokens) == ([0, 1], 1)


def test_a_sample_without_a_trained_token_weighs_nothing():
    for mode in ("token_mean", "sequence_mean"):
        weights, num_tokens = scaled_weights([sample(weight=0.0), sample()], mode)
        assert num_tokens == 2
        assert weights[0].tolist() == [0, 0, 0, 0]
        assert weights[1].tolist() == [0, 0, 1, 1]


def test_more_ranks_than_samples_leave_padding_only_micro_batches():
    plan = plan_update([sample()], max_tokens=16, dp_size=3, align=2)
    assert [[batch.sample_indices for batch in rank] for rank in plan.micro_batches] == [
        [(0,)],
        [(PADDING,)],
        [(PADDING,)],
    ]


def test_a_rank_that_needs_fewer_micro_batches_splits_what_it_has():
    # Dealt 12 + 3 and 9 + 9: the first hand would fit one bin of 15.
    samples = [sample((1,) * (length - 1), (2,)) for length in (12, 9, 9, 3)]
    plan = plan_update(samples, max_tokens=15, dp_size=2)
    assert [[batch.num_tokens for batch in rank] for rank in plan.micro_batches] == [[12, 3], [9, 9]]


def test_without_samples_there_is_nothing_to_do():
    plan = plan_update([], max_tokens=8, dp_size=2)
    assert (plan.micro_batches, plan.num_tokens, plan.num_samples) == (((), ()), 0, 0)
