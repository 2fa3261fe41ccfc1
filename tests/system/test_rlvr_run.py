"""A run of `rlvr` on the CPU, from its settings to its records: the demo policy and the rule verifier."""

import json

import pytest
from demo_runs import TEXT, rows, run
from metric_ranges import out_of_range


def test_a_run_with_verified_rewards_learns_and_leaves_its_record(tmp_path):
    (tmp_path / "prompts").mkdir()
    # What the demo policy answers in a box: a passage that it knows, with a hole at the end.
    prompts = {
        "mask": "<gen>{paragraph}",
        "prediction": "<pred>{masked_paragraph}",
        "question": "<pred>{question} [mask]",
    }
    for name, text in prompts.items():
        (tmp_path / "prompts" / f"{name}.txt").write_text(text)
    words = [text.split() for text in TEXT]
    rows_ = [{"question": " ".join(found[:14]), "answer": found[14]} for found in words]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_))
    flags = {
        "task": "rlvr",
        "template_dir": tmp_path / "prompts",
        "verifier_rule": "qwen",
        "length_penalty": 0.02,
        "max_response_tokens": 16,
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
    assert len(played) == 3 * 2 * 8 and {row["target"] for row in played} <= {found[14] for found in words}
    assert {row["reward"] < 0 for row in played if not row["valid"]} <= {True}
    for row in played:
        if not row["valid"]:
            assert row["reward"] == -0.5
        elif row["answer"] == row["target"]:
            assert row["reward"] == pytest.approx(1.0)
        elif row["reward"] > 0:  # the same, differently written: its length costs
            assert row["reward"] == pytest.approx(1 - 0.02 * round((1 - row["reward"]) / 0.02))
    assert sum(row["valid"] for row in played) >= 8
