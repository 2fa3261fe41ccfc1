"""The paper's next-token baselines and the schedule of games, as runs."""

import pytest
from demo_runs import rows, run, write_text


@pytest.fixture
def corpus(tmp_path):
    return write_text(tmp_path / "text.jsonl")


def played(folder):
    return rows(folder, "rollouts.jsonl")


def test_entropy_ntp_asks_for_tokens_of_the_policy_s_choice_and_random_ntp_for_others(tmp_path, corpus):
    asked = {}
    for task in ("random_ntp", "entropy_ntp"):
        assert run(tmp_path / task, corpus, task=task, train_iters=2, lr=1e-3) == 0
        found = played(tmp_path / task)
        assert {row["role"] for row in found} == {"prediction"} and len(found) == 2 * 2 * 4 * 4
        assert all(row["prompt"].count("[mask]") == 1 for row in found)
        asked[task] = {(row["mask_id"], row["target"]) for row in found}
    assert asked["random_ntp"] != asked["entropy_ntp"]


def test_random_spans_come_first_and_pretrain_zero_after_them(tmp_path, corpus):
    flags = {"warm_up_task": "random_span", "warm_up_task_steps": 1, "train_iters": 2}
    assert run(tmp_path / "run", corpus, **flags) == 0
    roles = {step: {row["role"] for row in played(tmp_path / "run") if row["step"] == step} for step in (1, 2)}
    assert roles == {1: {"prediction"}, 2: {"mask", "prediction"}}
