"""The learning test on its first seed, for every run of the tests; all three are in `tests/slow/test_learning.py`."""

from pathlib import Path

import pytest
from two_versions import FLIPPED_ADVANTAGE, play, warm_start


@pytest.mark.timeout(600)
def test_a_policy_learns_which_version_holds_and_with_the_advantage_flipped_does_not(tmp_path: Path) -> None:
    """Measured: 0.41 before, 0.70 after 32 steps; 0.16 after 10 steps the wrong way."""
    policy = warm_start(tmp_path, seed=0)

    learned = play(tmp_path, "learned", policy, seed=0, steps=32)
    control = play(tmp_path, "control", policy, seed=0, steps=2, lr=0.0)
    flipped = play(tmp_path, "flipped", policy, seed=0, steps=10, program=FLIPPED_ADVANTAGE)

    print(f"\nlearned {learned}, control {control}, flipped {flipped}")
    assert 0.25 < learned.before < 0.55  # both versions are known, so there is something to learn
    assert abs(control.rise) < 0.1  # sampling noise of 256 answers: 0.03 a score
    assert learned.after - control.after >= 0.2
    assert learned.unseen_after - control.unseen_after >= 0.2
    assert flipped.rise < -0.05
