"""A run of `rlvr` on the CPU, from its settings to its records: the demo policy and the rule verifier."""

import json

import pytest
from demo_runs import rows, run

from megatron_pz.report.metrics import out_of_range


def test_a_run_with_verified_rewards_learns_and_leaves_its_record(tmp_path):
    (tmp_path / "prompts").mkdir()
    for name, text in (
        ("mask", "<gen>{paragraph}"),
        ("prediction", "<pred>{masked_paragraph}"),
        ("question", "<pred>{question}"),
    ):
        (tmp_path / "prompts" / f"{name}.txt").write_text(text)
    questions = [
        {"question": f"A leech is a segmented parasitic worm, number {i}, that lives in fresh water.", "answer": "the"}
        for i in range(4)
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    flags = {
        "task": "rlvr",
        "template_dir": tmp_path / "prompts",
        "verifier_rule": "qwen",
        "length_penalty": 0.02,
        "max_response_tokens": 8,
        "n_predictions_per_mask": 8,
        "train_iters": 3,
        "lr": 1e-3,
    }
    assert run(tmp_path / "run", tmp_path / "q.jsonl", **flags) == 0
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found] == [1, 2, 3]
    for row in found:
        assert out_of_range(row) == []
        assert row["verifier/unverified_share"] == 0 and 0 <= row["verifier/right_share"] <= 1
    assert any("grad_norm" in row for row in found)  # some group had answers that earned differently
    played = rows(tmp_path / "run", "rollouts.jsonl")
    assert len(played) == 3 * 2 * 8 and {row["target"] for row in played} == {"the"}
    for row in played:
        if row["valid"]:
            right = row["answer"].strip().lower() == "the"
            assert row["reward"] == pytest.approx(1.0) if right else row["reward"] == 0
        else:
            assert row["reward"] == -0.5
