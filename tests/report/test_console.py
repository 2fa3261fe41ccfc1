"""The console, as a file sees it and as a terminal sees it."""

import io
import re

import pytest
from builders import group, mask, rollout

from megatron_pz.report.console import Console, duration, step_line, visible
from megatron_pz.types import Role

TASK = "pretrain_zero"
METRICS = {
    "reward/mask/mean": 0.412,
    "reward/prediction/mean": 0.3331,
    "mask/valid_rate": 0.951,
    "num_surviving_groups": 42.0,
    "loss": -0.01234,
    "grad_norm": 0.8123,
    "tokens/completion": 11.24,
    "time/rollout_s": 2.14,
    "time/train_s": 3.21,
    "time/step_s": 5.5,
}


def console(**kwargs):
    stream = io.StringIO()
    return Console(10, stream=stream, **kwargs), stream


def games():
    """A paragraph with a mask solved once in two, another mask that is invalid, and the predictions."""
    good, text = mask("[red]Oslo", "Oslo or [red]Oslo lies by the sea, and the sea is cold."), {"group_id": "1.0"}
    masks = [
        rollout(Role.GENERATOR, 0.0, answer=None, valid=False, reject_reason="no_mask", mask_id="1.0.0", **text),
        rollout(Role.GENERATOR, 0.5, answer="[red]Oslo", hidden=good, mask_id="1.0.1", **text),
    ]
    told = [("[red]Oslo", 1.0), ("Bergen\x1b[2J", 0.0)]
    predictions = [
        rollout(reward=reward, answer=answer, hidden=good, group_id="1.0.1", mask_id="1.0.1") for answer, reward in told
    ]
    return [group(masks), group(predictions)]


def test_a_step_is_one_plain_line_with_the_time_left():
    shown, stream = console()
    with shown:
        shown.step(3, METRICS)
        shown.step(4, {**METRICS, "time/step_s": 2.5, "eval/fixed_masks/accuracy": 0.25})
    lines = stream.getvalue().splitlines()
    assert lines == [
        "step  3/10  reward mask 0.412  prediction 0.333  valid 95%  groups 42  tokens 11.2  loss -0.0123  grad 0.812"
        "  rollout 2.1s  train 3.2s  38s left",  # 7 steps of 5.5 s
        "step  4/10  reward mask 0.412  prediction 0.333  fixed masks 25.0%  valid 95%  groups 42  tokens 11.2"
        "  loss -0.0123  grad 0.812  rollout 2.1s  train 3.2s  24s left",  # 6 steps of 4 s
    ]


def test_the_last_step_and_the_score_before_the_first_have_no_time_left():
    shown, stream = console()
    shown.step(0, {"eval/fixed_masks/accuracy": 0.5, "time/step_s": 9.0})
    shown.step(10, {"time/step_s": 5.0})
    assert stream.getvalue() == "step  0/10  fixed masks 50.0%\nstep 10/10\n"


def test_a_line_stays_one_line_however_long():
    shown, stream = console()
    shown.message("checkpoint " + "x" * 500 + "\nsecond")
    assert stream.getvalue() == "checkpoint " + "x" * 500 + " second\n"


def test_other_ranks_are_silent():
    shown, stream = console(enabled=False)
    with shown:
        shown.step(3, METRICS)
        shown.show_games(games(), 1, TASK)
        shown.message("hello")
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar_and_the_lines_stay():
    shown, stream = console(is_terminal=True)
    with shown:
        for step in (1, 2, 3):
            shown.step(step, METRICS)
        shown.show_games(games(), 1, TASK)
    text = stream.getvalue()
    assert "3/10" in text and "38s left" in text
    assert "\x1b[" in text
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    for step in (1, 2, 3):
        assert f"step  {step}/10  reward mask 0.412" in plain


def test_a_game_shows_the_mask_in_its_paragraph_and_the_predictions():
    shown, stream = console()
    shown.show_games(games(), 1, TASK)
    assert stream.getvalue().splitlines() == [
        "",
        "leads:1  Oslo or [[[red]Oslo]] lies by the sea, and the sea is cold.",
        r"  mask       \mask{ [red]Oslo}  reward 0.500",
        r"  prediction right  \boxed{ [red]Oslo}",
        r"  prediction wrong  \boxed{ Bergen·[2J}",
    ]


def test_where_format_is_paid_an_answer_is_readable_not_right():
    shown, stream = console()
    paid, unpaid = rollout(reward=1.0, answer="Rome"), rollout(reward=0.0, answer=None)
    shown.show_games([group([paid, unpaid])], 1, "format_only")
    lines = [line.split() for line in stream.getvalue().splitlines() if line.startswith("  prediction")]
    assert [line[1] for line in lines] == ["readable", "unreadable"], stream.getvalue()


def test_a_round_without_a_valid_mask_says_why():
    only = group([rollout(Role.GENERATOR, 0.0, answer=None, valid=False, reject_reason="no_mask", group_id="1.0")])
    shown, stream = console()
    shown.show_games([only], 3, TASK)
    assert "no braces  reward 0.000  rejected: no_mask" in stream.getvalue()


def test_chance_chosen_masks_are_shown_without_a_mask_response():
    shown, stream = console()
    shown.show_games([group([rollout(reward=1.0), rollout(reward=0.0)])], 2, "random_span")
    assert "[[Paris]] is the capital of France." in stream.getvalue()
    assert "mask  " not in stream.getvalue()


@pytest.mark.parametrize("count", [0, 1])
def test_as_many_games_are_shown_as_asked_for(count):
    shown, stream = console()
    shown.show_games(games() + [group([rollout(Role.GENERATOR, 0.0, hidden=mask(), group_id="1.1")])], count, TASK)
    assert stream.getvalue().count("leads:1") == count


def test_text_cannot_drive_the_terminal():
    assert visible("a\x1b]0;title\x07b\u202ec\u00a0d\r\n") == "a·]0;title·b·c d  "
    assert visible("نمی\u200cخواهم 👩\u200d🚀") == "نمی\u200cخواهم 👩\u200d🚀"


def test_durations_read_like_a_clock():
    assert [duration(s) for s in (0.2, 59.6, 61, 3600, 90_000)] == ["0s", "1m00s", "1m01s", "1h00m", "25h00m"]


def test_a_line_of_plain_text_training_has_no_rewards():
    assert str(step_line(7, 100, {"loss": 2.5, "grad_norm": 1.0})) == "step   7/100  loss 2.5000  grad 1"
