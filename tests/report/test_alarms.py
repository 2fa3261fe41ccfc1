"""Each alarm sounds at rollouts that have its fault, by the game's own health metrics, and none at a healthy run."""

import asyncio
import random
from pathlib import Path

import pytest
from builders import PLAIN, ByteTokenizer, TableEngine, mask, paragraph

from megatron_pz.config.schema import EngineConfig, EvaluateConfig, TaskConfig
from megatron_pz.evaluate.fixed_masks import FixedMasks, score, shuffled_set
from megatron_pz.report.alarms import ALARMS, Watch, told
from megatron_pz.report.jsonl import read_rows
from megatron_pz.report.metrics import METRICS
from megatron_pz.tasks.ask import Asker
from megatron_pz.tasks.registry import make_task

RECORDED = Path(__file__).parents[2] / "benchmarks" / "records" / "healthy_demo.jsonl"
TEXT = (
    "Mount Kilimanjaro is a dormant volcano in Tanzania, with 3 cones: Kibo, Mawenzi and Shira. Its elevation is 5895 metres; "
    "rain falls 2 months a year, and Snow lies on the top. Old maps elevate it further, and the snow is going."
)
WORDS = ("Kilimanjaro", "dormant", "volcano", "Tanzania", "Kibo", "Mawenzi", "Shira", "metres", "months")
NUM_STEPS = 6


def play(spans=WORDS, chance=0.5, wrong="nothing", *, thought="", whole=None, limit=400):
    """Health of `NUM_STEPS` rounds: masks drawn from `spans`, `chance` that a prediction is right; 8 of each.

    Args:
        wrong: what a wrong prediction says; a function of the hidden text, or text.
        thought: (mask, prediction) before what is said.
        whole: the mask response, in place of a span.
    """
    settings = TaskConfig(paragraphs_per_step=2, prompt_style="plain")
    tokenizer = ByteTokenizer()
    game = make_task(settings, EngineConfig(max_response_tokens=limit), tokenizer, PLAIN)
    hidden = {mask(span, TEXT).masked_text: span for span in spans}
    think = dict(zip(("mask", "prediction"), thought or ("", ""), strict=True))

    def reply(prompt, params):
        draw = random.Random(params.seed)
        if prompt.startswith("<gen>"):
            return think["mask"] + (whole or f"\\mask{{{draw.choice(spans)}}}")
        target = hidden[prompt.removeprefix("<pred>")]
        other = wrong if isinstance(wrong, str) else wrong(target)
        return think["prediction"] + f"\\boxed{{{target if draw.random() < chance else other}}}"

    engine = TableEngine(reply, tokenizer)
    rows = []
    for step in range(1, NUM_STEPS + 1):
        rollouts = asyncio.run(game.play([paragraph(TEXT, f"a:{i}") for i in range(2)], engine, (7, step)))
        rows.append({"step": step, **game.health(game.groups(rollouts, step))})
    return rows


def shuffled(by_heart):
    """Scores of a policy that knows the text, and names what is missing of its words, or reads what stands before the mask."""
    tokenizer = ByteTokenizer()
    asker = Asker(TaskConfig(prompt_style="plain"), EngineConfig(max_response_tokens=100), tokenizer, PLAIN)
    questions = FixedMasks("fixed_masks", tuple(mask(word, TEXT) for word in WORDS))
    config = EvaluateConfig()

    def reply(prompt, params):
        masked = prompt.removeprefix("<pred>")
        before = masked.partition("[mask]")[0]
        rest = masked.replace("[mask]", " ")
        missing = [word for word in WORDS if word not in rest] if by_heart else []
        read = [word for word in WORDS if TEXT.startswith(before + word)]
        return f"\\boxed{{{(missing or read or ['nothing'])[0]}}}"

    engine = TableEngine(reply, tokenizer)
    values = {}
    for asked in (questions, shuffled_set(questions, asker, config)):
        values |= asyncio.run(score(asked, asker, engine, config))[0]
    return [{"step": step, **values} for step in (0, 10)]


def upper(target):
    return target.upper()


FAULTS = {
    "lottery_masks: mask/lottery_share": lambda: play(spans=("3", "2", "5895", "with", "on the")),
    "lottery_masks: groups/one_right_share": lambda: play(chance=1 / 8),
    "near_misses: prediction/near_miss_rate": lambda: play(wrong=upper),
    "fragments: mask/whole_word_share": lambda: play(spans=("limanj", "olcan", "anzan", "orman", "wenz", "etre")),
    "invalid_masks: mask/valid_rate": lambda: play(whole=f"\\mask{{{TEXT}}}"),
    "generator_collapse: mask/distinct_share": lambda: play(spans=("Kibo",)),
    "generator_collapse: groups/duplicate_share/mask": lambda: play(spans=("Kibo",)),
    "flat_groups: groups/kept_share/prediction": lambda: play(chance=0),
    "flat_groups: groups/kept_share/mask": lambda: play(chance=1),
    "flat_groups: num_surviving_groups": lambda: play(chance=0),
    "visible_answer: mask/visible_share": lambda: play(spans=("Snow", "elevation", *WORDS[:2])),
    "shuffled_context: eval/shuffled/accuracy": lambda: shuffled(by_heart=True),
    "truncation: truncated_share/prediction": lambda: play(thought=("", "Let me think. " * 40)),
    "truncation: truncated_share/mask": lambda: play(thought=("Let me think. " * 40, "")),
}
"""Alarm and sign -> rows of a run that has the fault."""

ALSO = {
    "truncation: truncated_share/prediction": {"flat_groups"},  # what is cut off is wrong
    "truncation: truncated_share/mask": {
        "invalid_masks",
        "flat_groups",
        "generator_collapse",
    },  # the same beginning each time
    "invalid_masks: mask/valid_rate": {"flat_groups", "generator_collapse"},  # the same echo each time
}
"""What such a fault brings with it."""


def names(states):
    return {state.alarm.name for state in states if state.sounding}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_sign_sounds_at_its_fault_and_at_what_comes_of_it_alone(fault):
    name, metric = fault.split(": ")
    watch = Watch(FAULTS[fault]())
    state = next(state for state in watch.states() if state.alarm.name == name)
    assert metric in {sign.metric for sign in state.sounding}, state
    assert names(watch.states()) <= {name} | ALSO.get(fault, set())


def test_every_sign_of_every_alarm_has_its_fault():
    assert set(FAULTS) == {f"{alarm.name}: {sign.metric}" for alarm in ALARMS for sign in alarm.signs}


def test_nothing_sounds_where_the_game_is_played_well():
    watch = Watch(play())
    assert names(watch.states()) == set()
    assert {state.word for state in watch.states()} == {"silent", "not measured"}


def test_a_policy_that_reads_does_not_survive_the_shuffle():
    rows = shuffled(by_heart=False)
    assert rows[0]["eval/fixed_masks/accuracy"] == 1 and rows[0]["eval/shuffled/accuracy"] < 0.3
    assert names(Watch(rows).states()) == set()


def test_nothing_sounds_at_any_step_of_a_healthy_recorded_run():
    rows = list(read_rows(RECORDED))
    assert len(rows) == 41 and rows[-1]["step"] == 40
    watch = Watch()
    assert [state for row in rows for state in watch.see(row)] == []
    assert [row["alarms/sounding"] for row in rows] == [0] * 41
    assert {state.word for state in watch.states()} == {"silent"}  # each was measured


def test_an_alarm_waits_for_its_records_and_tells_itself_once():
    watch = Watch()
    row = {"truncated_share/mask": 0.2}
    told_at = [step for step in range(1, 9) if watch.see({"step": step, **(row if step != 2 else {})})]
    assert told_at == [4]  # three records with the metric
    calm = [watch.see({"step": step, "truncated_share/mask": 0.0}) for step in range(9, 12)]
    state = watch.states()[-1]
    assert calm == [[], [], []] and (state.word, state.first, state.last) == (
        "sounded",
        4,
        9,
    )  # (.2 + .2 + 0) / 3 is over 0.1


def test_a_ratio_of_nearly_nothing_is_no_sign():
    row = {"eval/shuffled/accuracy": 0.05, "eval/fixed_masks/accuracy": 0.05}
    watch = Watch({"step": step, **row} for step in range(3))
    assert {state.word for state in watch.states()} == {"not measured"}


def test_the_line_has_step_value_limit_meaning_and_action():
    (state,) = Watch([{"step": s, "truncated_share/mask": 0.25} for s in (1, 2)]).see(
        {"step": 3, "truncated_share/mask": 0.25}
    )
    line = told(state, 3)
    assert line.startswith(
        "alarm truncation at step 3: truncated_share/mask over 0.1 (mean of 3 records: 0.25). Responses reach"
    )
    assert line.endswith(state.alarm.action)


def test_signs_are_of_metrics_that_there_are():
    for alarm in ALARMS:
        for sign in alarm.signs:
            assert sign.metric in METRICS and (not sign.of or sign.of in METRICS), sign
            assert METRICS[sign.metric].low <= sign.limit <= METRICS[sign.metric].high
