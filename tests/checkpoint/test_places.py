"""Ranges of an array's numbers as boxes (checkpoint/places.py): each number once, in its order."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_pz.platform.select import select_platform

select_platform("cpu")  # before Megatron is imported

from megatron_pz.checkpoint.places import boxes  # noqa: E402


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_the_boxes_of_a_range_are_its_numbers_in_their_order(shape, data):
    array = np.arange(np.prod(shape)).reshape(shape)
    start = data.draw(st.integers(0, array.size))
    stop = data.draw(st.integers(start, array.size))
    found = [
        array[tuple(slice(first, first + size) for first, size in zip(offset, box, strict=True))].ravel()
        for offset, box in boxes(shape, start, stop)
    ]
    assert np.concatenate([np.arange(0), *found]).tolist() == list(range(start, stop))
    assert len(found) <= 2 * len(shape) - 1
