"""The order in which the corpus is read."""

from hypothesis import given
from hypothesis import strategies as st

from megatron_pz.corpus.cursor import Cursor


@given(st.integers(1, 60), st.integers(0, 2**40), st.integers(0, 5))
def test_an_epoch_takes_each_item_once(num_items, seed, epoch):
    assert sorted(Cursor(num_items, seed).take(epoch * num_items, num_items)) == list(range(num_items))


@given(st.integers(1, 20), st.integers(0, 99), st.integers(0, 80), st.lists(st.integers(0, 30), max_size=5))
def test_reading_in_pieces_is_reading_at_once(num_items, seed, position, pieces):
    read, here = [], position
    for n in pieces:
        read += Cursor(num_items, seed).take(here, n)  # a new cursor each time: nothing is remembered
        here += n
    assert read == Cursor(num_items, seed).take(position, sum(pieces))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [tuple(Cursor(50, seed).take(start, 50)) for seed in (1, 2) for start in (0, 50)]
    assert len(set(orders)) == 4


def test_the_order_never_changes_between_versions():
    # A run is resumed by position alone: another order would play some paragraphs twice and others never.
    assert Cursor(8, 1234).take(0, 12) == [7, 5, 6, 1, 0, 3, 2, 4, 5, 0, 4, 3]
