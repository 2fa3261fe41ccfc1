"""Rows of `rollouts.jsonl`, field by field."""

import json

from builders import group, mask, rollout

from megatron_pz.tasks.journal_rows import journal_rows
from megatron_pz.types import Completion, Role

FIELDS = """step role paragraph_id group_id mask_id prompt response answer target valid reject_reason reward advantage
trained num_tokens finish_reason weight_version""".split()


def _groups():
    hidden = mask()
    masks = [
        rollout(Role.GENERATOR, 0.5, hidden=hidden, group_id="3.0", mask_id="3.0.0"),
        rollout(
            Role.GENERATOR, 0.0, answer=None, valid=False, reject_reason="no_mask", group_id="3.0", mask_id="3.0.1"
        ),
    ]
    predictions = [rollout(reward=r, hidden=hidden, group_id="3.0.0", mask_id="3.0.0") for r in (1.0, 1.0)]
    return [group(masks), group(predictions)]


def test_a_row_has_the_fields_of_the_design_in_plain_json():
    rows = journal_rows(_groups(), step=3)
    assert len(rows) == 4
    assert all(list(row) == FIELDS for row in rows)
    assert json.loads(json.dumps(rows)) == rows


def test_a_mask_row_and_a_prediction_row_by_hand():
    rows = journal_rows(_groups(), step=3)
    assert rows[0] == {
        "step": 3,
        "role": "mask",
        "paragraph_id": "leads:1",
        "group_id": "3.0",
        "mask_id": "3.0.0",
        "prompt": "<gen>Paris is the capital of France.",
        "response": r"\mask{ Paris}",
        "answer": "Paris",
        "target": None,
        "valid": True,
        "reject_reason": None,
        "reward": 0.5,
        "advantage": _groups()[0].advantages[0],
        "trained": True,
        "num_tokens": 14,
        "finish_reason": "stop",
        "weight_version": 0,
    }
    assert (rows[1]["answer"], rows[1]["valid"], rows[1]["reject_reason"]) == (None, False, "no_mask")
    assert (rows[2]["role"], rows[2]["target"], rows[2]["mask_id"]) == ("prediction", "Paris", "3.0.0")
    assert (rows[2]["advantage"], rows[2]["trained"]) == (0.0, False)  # both right: the group was dropped


def test_the_version_is_that_of_the_last_token_or_the_one_given():
    completion = Completion((1,), (2, 3), (-0.1, -0.2), "stop", weight_versions=(4, 5))
    silent = Completion((1,), (2, 3), (-0.1, -0.2), "stop")
    base = rollout()
    fields = {name: getattr(base, name) for name in base.__slots__}
    made = [type(base)(**fields | {"completion": c}) for c in (completion, silent)]
    assert [row["weight_version"] for row in journal_rows([group(made)], 1, weight_version=9)] == [5, 9]
