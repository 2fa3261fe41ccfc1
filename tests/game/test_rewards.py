"""Equations 8 and 9, by hand."""

import math
import random

import pytest

from megatron_pz.game.rewards import INVALID_MASK_REWARD, format_reward, mask_reward, prediction_reward

TABLE_OF_8 = [0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0]  # docs/paper.md 2.5


def expected_mask_reward(accuracy, num_predictions):
    """Mean of Eq. 9 over predictions that are right with probability `accuracy`."""
    return (1 - accuracy) - (1 - accuracy) ** num_predictions


def test_a_prediction_earns_one_for_the_hidden_text_and_nothing_else():
    assert prediction_reward(" Paris", "Paris") == 1.0
    assert [prediction_reward(answer, "elevation") for answer in ("elevate", "Elevation", "", None)] == [0.0] * 4
    assert prediction_reward("Elevation", "elevation", "casefold") == 1.0


def test_format_alone_is_paid_the_same_for_right_and_wrong_and_not_for_nothing():
    answers = ["elevation", "elevate", "!", "", "  ", r"\text{ }", "\u3000", None]
    assert [format_reward(answer, "elevation") for answer in answers] == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(("num_correct", "wanted"), list(enumerate(TABLE_OF_8)))
def test_a_mask_earns_what_the_table_of_eight_says(num_correct, wanted):
    assert mask_reward(num_correct, 8) == wanted


def test_a_mask_that_nobody_solves_earns_nothing_whatever_the_group():
    assert [mask_reward(0, size) for size in (1, 2, 8, 64)] == [0.0] * 4
    assert mask_reward(1, 3) == pytest.approx(2 / 3)
    assert INVALID_MASK_REWARD == 0.0


@pytest.mark.parametrize(("accuracy", "wanted"), [(0, 0), (0.1, 0.469), (0.2, 0.632), (0.5, 0.496), (0.9, 0.1), (1, 0)])
def test_the_expected_reward_is_the_papers(accuracy, wanted):
    assert expected_mask_reward(accuracy, 8) == pytest.approx(wanted, abs=6e-4)  # three decimals, as printed


def test_the_expected_reward_is_the_mean_of_the_table_under_a_binomial():
    for accuracy in (0.05, 0.257, 0.6):
        weights = [math.comb(8, k) * accuracy**k * (1 - accuracy) ** (8 - k) for k in range(9)]
        mean = sum(w * mask_reward(k, 8) for k, w in enumerate(weights))
        assert mean == pytest.approx(expected_mask_reward(accuracy, 8), rel=1e-12)


def test_the_expected_reward_peaks_where_one_in_four_is_right():
    grid = [i / 1000 for i in range(1001)]
    best = max(grid, key=lambda p: expected_mask_reward(p, 8))
    assert best == pytest.approx(1 - 8 ** (-1 / 7), abs=1e-3)
    assert expected_mask_reward(best, 8) == pytest.approx(0.650, abs=5e-4)


def test_sampled_rewards_come_out_as_expected():
    rng, accuracy = random.Random(3), 0.3
    sampled = [mask_reward(sum(rng.random() < accuracy for _ in range(8)), 8) for _ in range(4000)]
    assert sum(sampled) / len(sampled) == pytest.approx(
        expected_mask_reward(accuracy, 8), abs=0.015
    )  # sd 0.19/sqrt(4000)
