"""Rounds that end before their slowest paragraphs: none is lost, none is played twice."""

import asyncio
import random
from collections import Counter

import pytest
from builders import PLAIN, ByteTokenizer, TableEngine
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_pz.config.schema import EngineConfig, TaskConfig
from megatron_pz.errors import EngineError
from megatron_pz.tasks.pretrain_zero import PretrainZero
from megatron_pz.tasks.random_span import RandomSpan
from megatron_pz.tasks.stragglers import Stragglers, num_begun
from megatron_pz.types import Completion, Paragraph, SamplingParams

SEED = 1234


class Scripted:
    """A task whose paragraphs take as many turns of the loop as their text says; a "rollout" is the paragraph's place."""

    def __init__(self):
        self.begun, self.ended = [], []

    async def play(self, paragraphs, generate, seed):
        return [r for i, p in enumerate(paragraphs) for r in await self.play_paragraph(p, i, generate, seed)]

    async def play_paragraph(self, paragraph, place, generate, seed):
        self.begun.append((seed[1], place))
        await generate([int(paragraph.text)], SamplingParams(1))
        self.ended.append((seed[1], place))
        return [(seed[1], place)]


async def turns(prompt_ids, params):
    for _ in range(prompt_ids[0]):
        await asyncio.sleep(0)
    return Completion(tuple(prompt_ids), (1,), (0.0,), "stop")


def texts(step, durations):
    return [Paragraph(f"{step}.{index}", str(duration)) for index, duration in enumerate(durations)]


def settings_of(how, share=0.5):
    return EngineConfig(stragglers=how, over_sampling=share)


def rounds(how, durations, per_step, share=0.5, together=False, **more):
    """Plays rounds whose paragraphs take `durations(step, index)` turns; the task and what each round came to."""
    task, steps = Scripted(), range(1, len(durations) + 1)

    async def play():
        rounds = Stragglers(task, settings_of(how, share), per_step, SEED, **more)
        one = [rounds.play(step, texts(step, durations[step - 1]), turns) for step in steps]
        played = await asyncio.gather(*one) if together else [await round_ for round_ in one]
        await rounds.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return played

    return task, asyncio.run(play())


@st.composite
def lengths(draw, how):
    per_step, share = draw(st.integers(1, 4)), draw(st.sampled_from([0.0, 0.25, 0.5, 1.0]))
    counts = [num_begun(settings_of(how, share), per_step, step) for step in range(1, draw(st.integers(1, 5)) + 1)]
    return per_step, share, [draw(st.lists(st.integers(0, 12), min_size=n, max_size=n)) for n in counts]


@settings(max_examples=80, deadline=None)
@given(given=lengths("continue"), together=st.booleans())
def test_what_goes_on_is_taken_once_by_a_later_round_or_still_left(given, together):
    per_step, share, durations = given
    task, played = rounds("continue", durations, per_step, share, together)
    everything = {(step, i) for step, of_step in enumerate(durations, 1) for i in range(len(of_step))}
    taken = [place for round_ in played for place in round_.rollouts]
    assert set(taken) <= set(task.begun) <= everything and max(Counter(task.begun).values()) == 1
    assert all(len(round_.rollouts) == per_step for round_ in played)
    assert len(set(taken)) == len(taken)
    assert set(taken) | set(played[-1].left) == everything and not set(taken) & set(played[-1].left)
    for step, round_ in enumerate(played, 1):
        assert all(begun <= step for begun, _ in (*round_.rollouts, *round_.left))
        assert round_.rollouts == sorted(round_.rollouts)
        assert round_.metrics == {"rounds/paragraphs_continued": len(round_.left)}
        assert len(round_.left) == len(durations[0]) - per_step


@settings(max_examples=80, deadline=None)
@given(given=lengths("cut"), together=st.booleans())
def test_what_is_cut_is_ended_and_counted_and_never_comes_back(given, together):
    per_step, share, durations = given
    task, played = rounds("cut", durations, per_step, share, together)
    for step, (round_, of_step) in enumerate(zip(played, durations, strict=True), 1):
        assert len(round_.rollouts) == per_step and {begun for begun, _ in round_.rollouts} == {step}
        longest = max(of_step[index] for _, index in round_.rollouts)
        others = {(step, i) for i in range(len(of_step))} - set(round_.rollouts)
        assert all(of_step[index] >= longest for _, index in others)
        assert round_.metrics["rounds/paragraphs_cut"] == len(others) == len(of_step) - per_step
        assert round_.metrics["rounds/requests_aborted"] == len(others - set(task.ended))
        assert round_.left == ()


def test_the_first_to_be_done_are_taken_and_ties_go_to_those_begun_first():
    _, [played] = rounds("cut", [[9, 2, 5, 2, 2, 30]], per_step=2)
    assert played.rollouts == [(1, 1), (1, 3)]
    assert played.metrics == {"rounds/paragraphs_cut": 4, "rounds/requests_aborted": 3}  # one was a tie


def test_a_straggler_goes_on_where_it_is_and_ends_with_the_round_it_fits():
    # 2 of 3 end round 1; the third, of 40 turns, outlives round 2 as well.
    _, played = rounds("continue", [[40, 1, 1], [2, 2], [90, 90]], per_step=2)
    assert [round_.rollouts for round_ in played] == [[(1, 1), (1, 2)], [(2, 0), (2, 1)], [(1, 0), (3, 0)]]
    assert [round_.left for round_ in played] == [((1, 0),), ((1, 0),), ((3, 1),)]


@settings(max_examples=40, deadline=None)
@given(given=lengths("continue"), stop=st.integers(1, 4))
def test_a_run_resumed_from_what_a_round_left_plays_every_paragraph_to_its_end(given, stop):
    per_step, share, durations = given
    stop = min(stop, len(durations))
    _, before = rounds("continue", durations[:stop], per_step, share)
    task = Scripted()

    async def resume():
        again = Stragglers(task, settings_of("continue", share), per_step, SEED)
        left = [
            ((step, i), Paragraph(f"{step}.{i}", str(durations[step - 1][i])), turns) for step, i in before[-1].left
        ]
        again.resume(left)
        played = [
            await again.play(step, texts(step, durations[step - 1]), turns)
            for step in range(stop + 1, len(durations) + 1)
        ]
        await again.close()
        return played

    after = asyncio.run(resume())
    taken = [place for round_ in (*before, *after) for place in round_.rollouts]
    left = (after or before)[-1].left
    everything = [(step, i) for step, of_step in enumerate(durations, 1) for i in range(len(of_step))]
    assert sorted([*taken, *left]) == everything


@pytest.mark.parametrize("how", ["cut", "continue"])
def test_a_round_played_again_takes_what_is_on_record_whatever_is_faster_now(how):
    record = {}
    sizes = [[5, 1, 1], [3, 9, 1] if how == "cut" else [3, 9]]
    _, first = rounds(how, sizes, per_step=2, record=record.__setitem__)
    assert record == {step: round_.rollouts for step, round_ in enumerate(first, 1)}
    other = [[1, 5, 5], [9, 1, 9] if how == "cut" else [9, 1]]

    def twice(step, taken):
        raise AssertionError("it is on record already")

    task, again = rounds(how, other, per_step=2, recorded=record.get, record=twice)
    assert [round_.rollouts for round_ in again] == [round_.rollouts for round_ in first]
    assert [round_.left for round_ in again] == [round_.left for round_ in first]
    if how == "cut":
        assert sorted(task.begun) == sorted(record[1] + record[2])  # nothing is generated to be cut
        assert again[0].metrics["rounds/paragraphs_cut"] == 1


def test_a_record_of_other_settings_is_not_followed():
    for foreign in ([(1, 0)], [(1, 0), (1, 7)], []):
        _, [played] = rounds("cut", [[9, 1, 1]], per_step=2, recorded=lambda step, foreign=foreign: foreign)
        assert played.rollouts == [(1, 1), (1, 2)]


def reply(prompt, params):
    rng = random.Random(params.seed)
    if prompt.startswith("<gen>"):
        return rng.choice([r"\mask{ Paris}", r"\mask{ the}", r"\mask{ Rome}", "no mask at all"])
    return rng.choice([r"\boxed{ Paris}", r"\boxed{ the}", "no box"])


PARAGRAPHS = [
    Paragraph("leads:1", "Paris is the capital of France."),
    Paragraph("leads:2", "The Seine flows through Paris and past Paris."),
    Paragraph("leads:3", "In the end Paris was taken by the other side."),
]


@pytest.mark.parametrize("game", [PretrainZero, RandomSpan])
@pytest.mark.parametrize("how", ["wait", "cut", "continue"])
def test_a_round_that_leaves_nothing_out_is_that_of_waiting(game, how):
    task = game(
        TaskConfig(n_masks_per_paragraph=3, n_predictions_per_mask=2, prompt_style="plain"),
        EngineConfig(max_response_tokens=40),
        ByteTokenizer(),
        PLAIN,
    )

    async def waited(engine):
        return await task.play(PARAGRAPHS, engine, (SEED, 1))

    async def ours(engine):
        rounds = Stragglers(task, settings_of(how, 0.0), len(PARAGRAPHS), SEED)
        return (await rounds.play(1, PARAGRAPHS, engine)).rollouts

    wanted, order = TableEngine(reply), random.Random(3)
    expected = asyncio.run(waited(wanted))
    found = TableEngine(reply)
    assert asyncio.run(ours(found)) == expected
    assert found.requests == wanted.requests
    assert asyncio.run(ours(TableEngine(reply, order=order))) == expected


@pytest.mark.parametrize("game", [PretrainZero, RandomSpan])
def test_one_paragraph_alone_is_its_part_of_the_round(game):
    task = game(
        TaskConfig(n_masks_per_paragraph=3, n_predictions_per_mask=2, prompt_style="plain"),
        EngineConfig(max_response_tokens=40),
        ByteTokenizer(),
        PLAIN,
    )

    async def one_by_one():
        engine = TableEngine(reply)
        played = [await task.play_paragraph(p, i, engine, (SEED, 1)) for i, p in reversed([*enumerate(PARAGRAPHS)])]
        return [rollout for of_paragraph in reversed(played) for rollout in of_paragraph]

    assert asyncio.run(one_by_one()) == asyncio.run(task.play(PARAGRAPHS, TableEngine(reply), (SEED, 1)))


@pytest.mark.parametrize("how", ["wait", "cut", "continue"])
def test_an_engines_error_arrives_as_itself_and_leaves_nothing_running(how):
    async def fail(prompt_ids, params):
        await asyncio.sleep(0)
        if prompt_ids[0] == 3:
            raise EngineError("the server went away")
        return await turns(prompt_ids, params)

    async def play():
        rounds = Stragglers(Scripted(), settings_of(how), 2, SEED)
        with pytest.raises(EngineError, match="went away"):
            await rounds.play(1, texts(1, [9, 3, 9]), fail)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(play())


def test_a_round_that_is_called_off_calls_off_its_paragraphs():
    async def play(how):
        rounds = Stragglers(Scripted(), settings_of(how), 2, SEED)
        one = asyncio.ensure_future(rounds.play(1, texts(1, [999, 999, 999]), turns))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        one.cancel()
        with pytest.raises(asyncio.CancelledError):
            await one
        assert asyncio.all_tasks() == {asyncio.current_task()}

    for how in ("cut", "continue"):
        asyncio.run(play(how))
