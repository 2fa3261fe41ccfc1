"""Sequences shared out over context-parallel ranks, and put together again."""

import dataclasses

import numpy as np
import pytest
from builders import sample
from hypothesis import given
from hypothesis import strategies as st

from megatron_pz.batch.context import PER_SEQUENCE, gathered_places, places, share, whole
from megatron_pz.batch.packing import PADDING, micro_batch
from megatron_pz.batch.schedule import plan_update

SIZES = st.integers(1, 5)
CHUNKS = st.lists(st.integers(1, 6), min_size=1, max_size=6)  # tokens of a chunk, of each sequence


def bounds(size: int, chunks: list[int]) -> np.ndarray:
    return np.cumsum([0, *(2 * size * chunk for chunk in chunks)])


def packed(lengths: list[int], **layout: int):
    samples = [
        sample(range(100 * i, 100 * i + n - 1), (100 * i + n - 1,), advantage=i + 0.5) for i, n in enumerate(lengths)
    ]
    weights = [np.array(one.loss_weights) for one in samples]
    return micro_batch(samples, weights, range(len(samples)), **layout)


def test_a_rank_has_a_chunk_from_the_front_and_one_from_the_back():
    # Chunks of the first sequence: 01 23 45 67; of the second: 8 9 10 11.
    assert places(np.array([0, 8, 12]), 2, 0).tolist() == [0, 1, 6, 7, 8, 11]
    assert places(np.array([0, 8, 12]), 2, 1).tolist() == [2, 3, 4, 5, 9, 10]


@given(SIZES, CHUNKS)
def test_every_token_is_on_one_rank_and_comes_back_to_its_place(size, chunks):
    cu_seqlens = bounds(size, chunks)
    everywhere = np.concatenate([places(cu_seqlens, size, rank) for rank in range(size)])
    assert sorted(everywhere) == list(range(cu_seqlens[-1]))
    values = np.random.default_rng(0).normal(size=(cu_seqlens[-1], 3))
    shares = [values[places(cu_seqlens, size, rank)] for rank in range(size)]
    assert np.array_equal(whole(shares, cu_seqlens), values)
    assert np.array_equal(np.concatenate(shares)[gathered_places(cu_seqlens, size)], values)


@given(st.integers(2, 5), CHUNKS)
def test_ranks_have_equally_many_keys_to_look_at(size, chunks):
    cu_seqlens = bounds(size, chunks)
    position = np.concatenate([np.arange(n) for n in np.diff(cu_seqlens)])
    assert len({int(position[places(cu_seqlens, size, rank)].sum()) for rank in range(size)}) == 1


@given(SIZES, st.integers(1, 4), st.lists(st.integers(2, 30), max_size=6))
def test_sequences_divide_over_context_ranks_and_each_share_over_tensor_ranks(size, align, lengths):
    batch = packed(lengths, context_size=size, align=align)
    multiple = 2 * size if size > 1 else 1
    assert all(length % multiple == 0 for length in np.diff(batch.cu_seqlens))
    assert batch.num_tokens % (size * align) == 0
    assert batch.num_tokens > 0
    # Of a sequence nothing is lost, and at most what makes it divisible is added.
    for length, tokens in zip(lengths, np.diff(batch.cu_seqlens), strict=False):
        assert length <= tokens < length + multiple


def test_padding_at_the_end_of_a_sequence_is_not_trained_and_continues_its_positions():
    batch = packed([5, 4], context_size=2)
    assert batch.cu_seqlens.tolist() == [0, 8, 12]
    assert batch.token_ids.tolist() == [0, 1, 2, 3, 4, 0, 0, 0, 100, 101, 102, 103]
    assert batch.position_ids.tolist() == [*range(8), *range(4)]
    assert batch.labels.tolist() == [1, 2, 3, 4, 0, 0, 0, 0, 101, 102, 103, 0]
    assert batch.loss_weights.nonzero()[0].tolist() == [3, 10]  # the last token of each sample, at the place before it
    assert batch.sample_indices == (0, 1)


def test_a_share_cuts_every_field_that_speaks_of_tokens():
    batch = dataclasses.replace(packed([5, 4], context_size=2), routed_experts=np.arange(24).reshape(12, 2, 1))
    mine = share(batch, 2, 1)
    at = [2, 3, 4, 5, 9, 10]
    for field in dataclasses.fields(batch):
        found, of_row = getattr(mine, field.name), getattr(batch, field.name)
        wanted = of_row if field.name in PER_SEQUENCE else of_row[at]
        assert np.array_equal(found, wanted), field.name
    assert mine.num_tokens == 6
    assert share(batch, 1, 0) is batch


@pytest.mark.parametrize(("count_multiple", "count"), [(1, 3), (2, 4), (4, 4)])
def test_the_number_of_micro_batches_is_what_interleaved_stages_need(count_multiple, count):
    samples = [sample(range(7), (1,)) for _ in range(3)]
    plan = plan_update(samples, max_tokens=8, count_multiple=count_multiple)
    assert [len(batches) for batches in plan.micro_batches] == [count]
    empty = [batch for batch in plan.micro_batches[0] if set(batch.sample_indices) == {PADDING}]
    assert len(empty) == count - 3
    assert not any(batch.loss_weights.any() for batch in empty)
    assert plan.num_tokens == 3


def test_the_budget_counts_the_padding():
    # 5 tokens are 8 on two ranks: two of them do not fit into 12.
    samples = [sample(range(4), (1,)) for _ in range(2)]
    assert len(plan_update(samples, max_tokens=12).micro_batches[0]) == 1
    assert len(plan_update(samples, max_tokens=12, context_size=2).micro_batches[0]) == 2
