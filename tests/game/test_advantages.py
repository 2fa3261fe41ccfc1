"""Equation 10 and the filter, by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_pz.game.advantages import advantages
from megatron_pz.game.filters import is_informative

REWARDS = st.lists(st.sampled_from([0.0, 0.125, 0.5, 0.625, 0.875, 1.0]), min_size=2, max_size=12)


def test_two_right_of_eight_by_hand():
    # mean 1/4; unbiased variance (2 (3/4)^2 + 6 (1/4)^2) / 7 = 1.5 / 7, standard deviation 0.46291
    found = advantages([1, 0, 0, 1, 0, 0, 0, 0], eps=0.0)
    right, wrong = 0.75 / math.sqrt(1.5 / 7), -0.25 / math.sqrt(1.5 / 7)
    assert found == pytest.approx([right, wrong, wrong, right, wrong, wrong, wrong, wrong], rel=1e-12)
    assert (right, wrong) == (pytest.approx(1.6202, abs=1e-4), pytest.approx(-0.5401, abs=1e-4))


def test_masks_by_hand_with_a_zero_that_stays_in_its_group():
    # rewards 7/8 and 1/8, and 0 for one that nobody solved: mean 1/3, unbiased variance 0.447917 / 2, std 0.473242
    found = advantages([0.875, 0.125, 0.0], eps=0.0)
    assert found == pytest.approx([1.144587, -0.440226, -0.704361], abs=1e-5)


def test_eps_is_added_to_the_standard_deviation():
    assert advantages([1.0, 0.0], eps=0.5)[0] == pytest.approx(0.5 / (math.sqrt(0.5) + 0.5), rel=1e-12)


@pytest.mark.parametrize("rewards", [[], [1.0], [0.0] * 8, [0.1] * 3, [1.0] * 8])
def test_a_flat_group_has_no_advantage_at_all(rewards):
    assert advantages(rewards) == (0.0,) * len(rewards)
    assert not is_informative(rewards)


@given(REWARDS)
def test_advantages_are_centred_scaled_and_ordered_as_the_rewards(rewards):
    found = advantages(rewards)
    assert sum(found) == pytest.approx(0, abs=1e-9)
    if is_informative(rewards):
        assert sum(a * a for a in found) / (len(found) - 1) == pytest.approx(1, rel=1e-3)  # eps takes a little off
    assert all(
        (a > b) == (x > y) for x, a in zip(rewards, found, strict=True) for y, b in zip(rewards, found, strict=True)
    )


@given(REWARDS)
def test_a_group_is_kept_exactly_where_its_rewards_have_a_variance(rewards):
    assert is_informative(rewards) == any(a != 0 for a in advantages(rewards))


@pytest.mark.parametrize("num_right", range(9))
def test_of_eight_predictions_all_wrong_and_all_right_are_dropped(num_right):
    assert is_informative([1.0] * num_right + [0.0] * (8 - num_right)) == (0 < num_right < 8)
