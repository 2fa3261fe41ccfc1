"""Health metrics of a round made by hand."""

import pytest
from builders import group, mask, rollout

from megatron_pz.game.spans import MASK_REJECT_REASONS
from megatron_pz.report.metrics import METRICS
from megatron_pz.tasks.health import health
from megatron_pz.types import Role

TEXT = "the cat and the dog saw the bird of the year"


def _predictions(number, hidden, rewards, **fields):
    return group(
        [rollout(reward=r, hidden=hidden, group_id=f"1.0.{number}", mask_id=f"1.0.{number}", **fields) for r in rewards]
    )


THE, CAT, PART = mask("the", TEXT), mask("cat", TEXT), mask("ea", TEXT)
GROUPS = [
    group(
        [
            rollout(Role.GENERATOR, 0.0, answer="the", hidden=THE),
            rollout(Role.GENERATOR, 0.5, answer="cat", hidden=CAT),
            rollout(Role.GENERATOR, 0.0, answer="the", hidden=THE),
            rollout(Role.GENERATOR, 0.0, answer="ea", hidden=PART),
            rollout(Role.GENERATOR, 0.0, answer="cow", valid=False, reject_reason="not_in_paragraph"),
            rollout(Role.GENERATOR, 0.0, answer=None, valid=False, reject_reason="truncated", finish_reason="length"),
        ]
    ),
    _predictions(0, THE, [1.0, 1.0], answer="the"),
    _predictions(1, CAT, [1.0, 0.0], answer="Cat."),
    _predictions(2, THE, [1.0, 1.0], answer="the"),
    _predictions(3, PART, [0.0, 0.0], answer=None, valid=False, reject_reason="no_box"),
]


def test_the_numbers_of_a_round_by_hand():
    values = health(GROUPS)
    wanted = {
        "reward/mask/mean": 0.5 / 6,
        "reward/prediction/mean": 5 / 8,
        "mask/valid_rate": 4 / 6,
        "mask/reject/not_in_paragraph": 1,
        "mask/reject/truncated": 1,
        "mask/reject/no_mask": 0,
        "mask/length_chars": (3 + 3 + 3 + 2) / 4,
        "mask/length_words": 1,
        "mask/occurrences": (4 + 1 + 4 + 1) / 4,
        "mask/stop_word_share": 2 / 4,
        "mask/whole_word_share": 3 / 4,
        "mask/distinct_share": 3 / 4,  # the, cat, the, ea
        "mask/lottery_share": 2 / 4,
        "mask/visible_share": 0,
        "groups/duplicate_share/mask": 1 / 6,  # the, cat, the, ea, cow, nothing
        "groups/duplicate_share/prediction": (1 / 2 + 1 / 2 + 1 / 2 + 1 / 2) / 4,
        "groups/all_wrong_share": 1 / 4,
        "groups/all_right_share": 2 / 4,
        "groups/kept_share/mask": 1,
        "groups/kept_share/prediction": 1 / 4,
        "num_surviving_groups": 2,
        "truncated_share/mask": 1 / 6,
        "truncated_share/prediction": 0,
        "prediction/format_rate": 6 / 8,
        "prediction/near_miss_rate": 2 / 8,  # "Cat." for "cat"
    }
    assert {name: values[name] for name in wanted} == pytest.approx(wanted)


def test_tokens_are_those_of_the_responses():
    values = health(GROUPS)
    by_role = {
        role: [len(r.completion.token_ids) for g in GROUPS if g.role is role for r in g.rollouts] for role in Role
    }
    masks, predictions = by_role[Role.GENERATOR], by_role[Role.PREDICTOR]
    assert values["tokens/completion/mask"] == pytest.approx(sum(masks) / 6)
    assert values["tokens/completion/prediction"] == pytest.approx(sum(predictions) / 8)
    assert values["tokens/completion"] == pytest.approx(sum(masks + predictions) / 14)
    assert len(r"\boxed{ the}") + 1 == predictions[0]  # one byte a token, and the end


def test_what_the_table_says_of_a_game_is_measured_and_nothing_else():
    of_games = {name for name, row in METRICS.items() if row.section in ("Rewards", "Masks", "Predictions", "Groups")}
    of_games -= {name for name in METRICS if name.startswith("verifier/")}  # tests/tasks/test_rlvr.py
    of_responses = {name for name in METRICS if name.startswith(("tokens/completion", "truncated_share/"))}
    assert set(health([*GROUPS, _predictions(4, CAT, [1.0, 0.0, 0.0, 0.0])])) == of_games | of_responses
    assert {f"mask/reject/{reason}" for reason in MASK_REJECT_REASONS} <= of_games


def test_a_round_without_rollouts_counts_nothing_and_fails_nowhere():
    assert health([]) == {"num_surviving_groups": 0.0}


def test_one_right_of_fewer_than_four_says_nothing_about_luck():
    one_of_four, two_of_four = _predictions(0, CAT, [1.0, 0.0, 0.0, 0.0]), _predictions(1, CAT, [1.0, 1.0, 0.0, 0.0])
    assert health([one_of_four, two_of_four, *GROUPS])["groups/one_right_share"] == 1 / 2
    assert "groups/one_right_share" not in health(GROUPS)


def test_a_response_is_repeated_where_its_tokens_are_not_where_its_answer_is():
    group_of = [rollout(answer="Paris"), rollout(answer=" Paris"), rollout(answer="Paris"), rollout(answer="Paris")]
    assert health([group(group_of)])["groups/duplicate_share/prediction"] == 2 / 4


def test_an_answer_that_still_stands_in_the_text_is_counted():
    text = "Amber is a resin. Raw amber is cut, and resins harden."
    hidden = [mask(answer, text) for answer in ("Amber", "resin", "harden", "Raw")]
    assert [h.num_occurrences for h in hidden] == [1, 2, 1, 1]  # that of "resins" is hidden too
    values = health([_predictions(i, h, [1.0, 0.0]) for i, h in enumerate(hidden)])
    assert values["mask/visible_share"] == 1 / 4


def test_where_no_mask_is_valid_there_are_no_predictions_to_speak_of():
    bad = rollout(Role.GENERATOR, 0.0, answer=None, valid=False, reject_reason="no_mask")
    values = health([group([bad, bad])])
    assert values["mask/valid_rate"] == 0 and values["mask/reject/no_mask"] == 2
    assert "reward/prediction/mean" not in values and "mask/length_chars" not in values
    assert "mask/distinct_share" not in values


def test_one_masks_are_judged_at_the_place_that_is_hidden():
    text = "concat the cat"
    hidden = mask("cat", text)
    part, whole = hidden.spans

    def one(span):
        masked = text[: span[0]] + "[mask]" + text[span[1] :]
        return type(hidden)("p", "cat", (span,), masked, num_occurrences=2)

    assert health([_predictions(0, one(part), [1.0])])["mask/whole_word_share"] == 0
    assert health([_predictions(0, one(whole), [1.0])])["mask/whole_word_share"] == 1
