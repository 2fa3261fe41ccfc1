"""Where a run stands, in numbers that a checkpoint can hold."""

from megatron_pz.train.state import RunState


def test_a_step_moves_on_and_the_version_only_with_an_update():
    state = RunState(seed=3).advance(8, updated=True).advance(8, updated=False).advance(5, updated=True)
    assert (state.seed, state.step, state.position, state.policy_version) == (3, 3, 21, 2)


def test_it_survives_a_checkpoint():
    state = RunState(seed=1, step=40, position=320, policy_version=37)
    assert RunState.from_json(state.to_json()) == state


def test_a_state_does_not_change():
    state = RunState(seed=1)
    state.advance(1, updated=True)
    assert state == RunState(seed=1)
