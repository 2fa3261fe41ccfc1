"""PretrainZero makes a tiny policy better at fixed questions, about played texts and others, on three seeds."""

from pathlib import Path

import pytest
from two_versions import FLIPPED_ADVANTAGE, FLIPPED_LOSS, play, warm_start

STEPS = 40


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fixed_mask_accuracy_rises_by_a_fifth_over_the_control(tmp_path: Path, seed: int) -> None:
    policy = warm_start(tmp_path, seed)

    learned = play(tmp_path, "learned", policy, seed, steps=STEPS)
    control = play(tmp_path, "control", policy, seed, steps=STEPS, lr=0.0)

    print(f"\nseed {seed}: learned {learned}, control {control}")
    assert 0.25 < control.before < 0.55
    assert abs(control.rise) < 0.1  # sampling noise of 256 answers: 0.03 a score
    assert learned.after - control.after >= 0.2
    assert learned.unseen_after - control.unseen_after >= 0.2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_with_the_sign_of_advantage_or_loss_flipped_accuracy_falls(tmp_path: Path) -> None:
    policy = warm_start(tmp_path, seed=0)

    for name, program in (("advantage", FLIPPED_ADVANTAGE), ("loss", FLIPPED_LOSS)):
        wrong = play(tmp_path, name, policy, seed=0, steps=STEPS // 2, program=program)
        print(f"\n{name} flipped: {wrong}")
        assert wrong.rise < -0.05, name
