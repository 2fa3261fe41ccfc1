"""Seconds by phase, on a clock that the test moves."""

import pytest

from megatron_pz.report.metrics import check
from megatron_pz.report.timers import Timers


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_phases_add_up_and_a_lap_begins_anew(clock):
    timers = Timers(clock)
    with timers("rollout"):
        clock.now += 2
    clock.now += 0.5  # in no phase
    for _ in range(2):
        with timers("train"):
            clock.now += 1.5
    lap = timers.lap()
    assert lap == {"time/rollout_s": 2.0, "time/train_s": 3.0, "time/step_s": 5.5}
    check(lap)
    clock.now += 1
    assert timers.lap() == {"time/step_s": 1.0}


def test_a_phase_inside_another_is_not_counted_twice(clock):
    timers = Timers(clock)
    with timers("train"):
        clock.now += 1
        with timers("score"):
            clock.now += 4
        clock.now += 2
    assert timers.lap() == {"time/train_s": 3.0, "time/score_s": 4.0, "time/step_s": 7.0}


def test_a_phase_that_fails_is_counted(clock):
    timers = Timers(clock)
    with pytest.raises(ValueError, match="no"), timers("sync"):
        clock.now += 3
        raise ValueError("no")
    assert timers.lap()["time/sync_s"] == 3.0


def test_a_lap_within_a_phase_splits_it(clock):
    timers = Timers(clock)
    with timers("checkpoint"):
        clock.now += 1
        assert timers.lap() == {"time/checkpoint_s": 1.0, "time/step_s": 1.0}
        clock.now += 2
    assert timers.lap() == {"time/checkpoint_s": 2.0, "time/step_s": 2.0}


def test_the_real_clock_goes_forward():
    timers = Timers()
    with timers("eval"):
        pass
    lap = timers.lap()
    assert 0 <= lap["time/eval_s"] <= lap["time/step_s"]
