"""Completions on disk as they land: read back bit for bit, never generated twice, never lost."""

import asyncio
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from builders import PLAIN, ByteTokenizer, TableEngine
from demo_runs import files_of_at_most
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_pz.checkpoint.completion_lines import completions, from_row, read_lines, request_key, to_row
from megatron_pz.checkpoint.journal import GATHER_S, CompletionJournal
from megatron_pz.config.schema import EngineConfig, TaskConfig
from megatron_pz.errors import DiskError, EngineError
from megatron_pz.report.jsonl import to_line
from megatron_pz.tasks.pretrain_zero import PretrainZero
from megatron_pz.types import Completion, Paragraph, SamplingParams

TASK = TaskConfig(n_masks_per_paragraph=3, n_predictions_per_mask=2, prompt_style="plain", max_prompt_tokens=80)
PARAGRAPHS = [
    Paragraph("leads:1", "Paris is the capital of France."),
    Paragraph("leads:2", "The Seine flows through Paris and past Paris."),
]
STEP, VERSION = 7, 6
GAME = PretrainZero(TASK, EngineConfig(max_response_tokens=40), ByteTokenizer(), PLAIN)


def reply(prompt, params):
    """A function of the request: four kinds of mask, predictions right now and then."""
    rng = random.Random(params.seed)
    if prompt.startswith("<gen>"):
        return rng.choice([r"\mask{ Paris}", r"\mask{ the}", r"\mask{ Rome}", "no mask at all"])
    return rng.choice([r"\boxed{ Paris}", r"\boxed{ the}", "no box"])


class CountingEngine:
    """Answers from `reply`, in shuffled order; breaks off before answer number `breaks_at`."""

    def __init__(self, order=0, breaks_at=None, version=VERSION):
        self.table = TableEngine(reply, order=random.Random(order))
        self.breaks_at, self.version, self.answered = breaks_at, version, []

    async def __call__(self, prompt_ids, params):
        completion = await self.table(prompt_ids, params)
        if len(self.answered) == self.breaks_at:
            raise EngineError("killed")
        self.answered.append(params.seed)
        rng = random.Random(params.seed)
        return replace(
            completion,
            logprobs=tuple(-rng.random() for _ in completion.token_ids),
            weight_versions=(self.version,) * len(completion.token_ids),
        )


def play(folder, engine, **rules):
    """The round, with a journal; what the journal answered and what the engine did."""
    journal = CompletionJournal(folder)
    kept = journal.keep(engine, STEP, **rules)
    try:
        return asyncio.run(GAME.play(PARAGRAPHS, kept, (1234, STEP))), kept
    finally:
        journal.close()


WHOLE = asyncio.run(GAME.play(PARAGRAPHS, CountingEngine(), (1234, STEP)))
NUM_REQUESTS = len(WHOLE)


@settings(max_examples=40, deadline=None)
@given(breaks_at=st.integers(0, NUM_REQUESTS - 1), order=st.integers(0, 99), torn=st.floats(0, 1))
def test_after_a_crash_at_any_record_the_round_is_that_of_no_crash_and_nothing_is_generated_twice(
    tmp_path_factory, breaks_at, order, torn
):
    folder = tmp_path_factory.mktemp("journal")
    first = CountingEngine(order, breaks_at)
    with pytest.raises(EngineError):
        play(folder, first)
    file = CompletionJournal(folder).path(STEP)
    if breaks_at:  # the last record may have been torn anywhere
        content = file.read_bytes()
        last = content.rstrip(b"\n").rfind(b"\n") + 1
        file.write_bytes(content[: last + round(torn * (len(content) - last))])
    on_disk = len(completions(read_lines(file)))
    assert breaks_at - 1 <= on_disk <= breaks_at
    second = CountingEngine(order + 1)
    rollouts, kept = play(folder, second)
    assert rollouts == WHOLE
    assert (kept.num_read, kept.num_generated) == (on_disk, NUM_REQUESTS - on_disk)
    assert len(second.answered) == NUM_REQUESTS - on_disk
    twice = set(first.answered) & set(second.answered)
    assert len(twice) == breaks_at - on_disk  # only what was torn
    third = CountingEngine()
    assert play(folder, third)[0] == WHOLE and third.answered == []


def test_a_killed_process_leaves_all_but_its_last_moments(tmp_path):
    program = f"""
import asyncio, sys
sys.path.insert(0, "tests")
from pathlib import Path
from megatron_pz.checkpoint.journal import CompletionJournal
from megatron_pz.types import Completion, SamplingParams

async def generate(prompt_ids, params):
    return Completion(tuple(prompt_ids), (params.seed,), (-0.5,), "stop", (0,))

async def main():
    kept = CompletionJournal(Path({str(tmp_path)!r})).keep(generate, 1)
    for seed in range(10**6):
        await kept([1, 2], SamplingParams(4, seed=seed))
        print(seed, flush=True)
        await asyncio.sleep(0.002)

asyncio.run(main())
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if int(line) >= 100:
            break
    time.sleep(10 * GATHER_S)  # a loaded machine
    process.send_signal(signal.SIGKILL)
    process.communicate()
    found = completions(read_lines(CompletionJournal(tmp_path).path(1)))
    assert [recorded.completion.token_ids[0] for recorded in found[:101]] == list(range(101))
    assert found[50].key == request_key([1, 2], SamplingParams(4, seed=50), 1)


def test_other_weights_another_step_or_another_seed_is_another_request(tmp_path):
    play(tmp_path, CountingEngine(), weights="aa")
    for rules, expected in (({"weights": "aa"}, 0), ({"weights": "bb"}, NUM_REQUESTS), ({}, NUM_REQUESTS)):
        engine = CountingEngine()
        play(tmp_path, engine, **rules)
        assert len(engine.answered) == expected
    params = SamplingParams(4, seed=1)
    keys = {
        request_key(ids, p, step)
        for ids in ([1, 2], [1, 3], [12], [1, 2, 0])
        for p in (params, replace(params, seed=2), replace(params, temperature=0.5))
        for step in (1, 2)
    }
    assert len(keys) == 4 * 3 * 2


def test_tokens_of_versions_out_of_range_are_generated_again(tmp_path):
    play(tmp_path, CountingEngine(version=4))
    for versions, expected in (((4, 4), 0), ((3, 5), 0), (None, 0), ((5, 5), NUM_REQUESTS)):
        engine = CountingEngine(version=5)
        rollouts, _ = play(tmp_path, engine, versions=versions)
        assert len(engine.answered) == expected
        assert {v for r in rollouts for v in r.completion.weight_versions} == {5 if expected else 4}
    engine = CountingEngine()
    play(tmp_path, engine, versions=(5, 5))  # the second record of each request, not the first
    assert engine.answered == []


def test_a_response_that_was_given_up_is_not_on_record(tmp_path):
    async def give_up(prompt_ids, params):
        return Completion(tuple(prompt_ids), (1,), (-0.5,), "abort", (0,))

    journal = CompletionJournal(tmp_path)
    asyncio.run(journal.keep(give_up, 1)([1], SamplingParams(4)))
    journal.close()
    assert completions(read_lines(journal.path(1))) == []


def test_equal_requests_are_answered_as_often_as_they_were(tmp_path):
    answers = iter(range(9))

    async def count(prompt_ids, params):
        return Completion(tuple(prompt_ids), (next(answers),), (-0.5,), "stop", (0,))

    async def ask(times):
        journal = CompletionJournal(tmp_path)
        kept = journal.keep(count, 1)
        found = [(await kept([1], SamplingParams(4))).token_ids[0] for _ in range(times)]
        journal.close()
        return found

    assert asyncio.run(ask(2)) == [0, 1]
    assert asyncio.run(ask(3)) == [0, 1, 2]


@settings(max_examples=60, deadline=None)
@given(
    data=st.lists(st.tuples(st.integers(0, 2**31 - 1), st.floats(allow_nan=False), st.integers(0, 9)), max_size=6),
    single=st.booleans(),
)
def test_a_line_gives_back_what_was_put_on_it(data, single):
    logprobs = tuple(float(np.float32(p)) if single and abs(p) < 3e38 else p for _, p, _ in data)
    put = Completion((3, 1), tuple(i for i, _, _ in data), logprobs, "length", tuple(v for _, _, v in data))
    recorded = from_row(to_row("k", put))
    assert recorded is not None and (recorded.key, recorded.completion) == ("k", put)


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8"])
@pytest.mark.parametrize("highest", [3, 127, 200, -1])
def test_routed_experts_come_back(dtype, highest):
    experts = (np.arange(24).reshape(4, 3, 2) % 3).astype(dtype)
    experts[0, 0, 0] = np.array(highest).astype(dtype)
    put = Completion((1, 2), (3, 4, 5), (-0.5, -math.inf, 0.0), "stop", (0, 0, 1), routed_experts=experts)
    row = to_row("k", put)
    got = from_row(row).completion
    assert got.routed_experts.dtype == experts.dtype and np.array_equal(got.routed_experts, experts)
    assert replace(got, routed_experts=None) == replace(put, routed_experts=None)
    if highest >= 0:
        assert len(row["routed_experts"]["data"]) == 32  # 24 experts below 256: a byte each


@pytest.mark.parametrize(
    "spoil",
    [
        lambda row: row.pop("logprobs"),
        lambda row: row.update(token_ids={"as": "<i4", "data": "AAA"}),
        lambda row: row.update(weight_versions=[[0, 3]]),
        lambda row: row.update(logprobs=to_row("k", Completion((), (1,), (0.0,), "stop"))["logprobs"]),
        lambda row: row.update(prompt_ids=None),
    ],
)
def test_a_damaged_line_is_no_record(spoil):
    row = to_row("k", Completion((1,), (2, 3), (-0.5, -0.25), "stop", (0, 0)))
    assert from_row(row) is not None
    spoil(row)
    assert from_row(row) is None


def test_lines_after_a_damaged_one_are_read_and_the_torn_end_does_not_spoil_the_next(tmp_path):
    journal = CompletionJournal(tmp_path)
    good = to_line(to_row("a", Completion((1,), (2,), (-0.5,), "stop", (0,)))).encode()
    tmp_path.mkdir(exist_ok=True)
    journal.path(1).write_bytes(good + b"\x00\x00 not json\n" + good.replace(b'"a"', b'"b"') + good[:-1])
    assert [r.key for r in completions(read_lines(journal.path(1)))] == ["a", "b"]

    async def answer(prompt_ids, params):
        return Completion(tuple(prompt_ids), (9,), (-0.5,), "stop", (0,))

    asyncio.run(journal.keep(answer, 1)([5], SamplingParams(4)))
    journal.close()
    assert [r.completion.token_ids for r in completions(read_lines(journal.path(1)))] == [(2,), (2,), (9,)]


def test_a_full_disk_ends_the_round_with_what_was_written_before(tmp_path):
    with files_of_at_most(2000), pytest.raises(DiskError, match=r"step_000007.jsonl.*Free some room"):
        play(tmp_path, CountingEngine())
    content = CompletionJournal(tmp_path).path(STEP)
    assert not content.exists() or content.read_bytes()[-1:] in (b"", b"\n")
    on_disk = len(completions(read_lines(content)))
    engine = CountingEngine()
    assert play(tmp_path, engine)[0] == WHOLE  # once there is room
    assert len(engine.answered) == NUM_REQUESTS - on_disk


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="file/journal/step_000007.jsonl"):
        play(tmp_path / "file" / "journal", CountingEngine())


def test_records_go_when_no_resume_can_reach_them(tmp_path):
    journal = CompletionJournal(tmp_path / "journal")
    journal.prune(3)  # nothing is there yet
    for step in (1, 2, 3, 4, 5, 1_000_001):
        journal.note_taken(step, [(step, 0)])
    journal.flush()
    (journal.folder / "notes.txt").write_text("mine")
    journal.prune(3)
    left = sorted(path.name for path in journal.folder.iterdir())
    assert left == ["notes.txt", "step_000004.jsonl", "step_000005.jsonl", "step_1000001.jsonl"]
    journal.close()


def test_what_a_round_ended_with_is_on_record_for_the_weights_it_was_played_with(tmp_path):
    def note(places, weights):
        journal = CompletionJournal(tmp_path)
        journal.note_taken(3, places, weights)
        journal.close()
        return CompletionJournal(tmp_path)

    assert CompletionJournal(tmp_path).taken(3) is None
    journal = note([(2, 5), (3, 0)], "aa")
    assert journal.taken(3, "aa") == [(2, 5), (3, 0)]
    assert journal.taken(3, "bb") is None and journal.taken(2, "aa") is None
    assert note([(3, 1), (3, 0)], "aa").taken(3, "aa") == [(3, 1), (3, 0)]


def test_the_game_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    synced, is_over = os.fsync, threading.Event()

    def stuck(handle):
        assert is_over.wait(60), "the game waits for the disk"
        synced(handle)

    monkeypatch.setattr(os, "fsync", stuck)
    journal = CompletionJournal(tmp_path)
    kept = journal.keep(CountingEngine(), STEP)
    asyncio.run(GAME.play(PARAGRAPHS, kept, (1234, STEP)))
    is_over.set()
    journal.close()
    assert len(completions(read_lines(journal.path(STEP)))) == NUM_REQUESTS


def test_equal_weights_have_one_digest_and_a_bit_more_another():
    import torch

    from megatron_pz.checkpoint.weights_digest import weights_digest

    model = torch.nn.Linear(3, 2)
    before = weights_digest([model])
    assert weights_digest([model]) == before
    with torch.no_grad():
        model.weight[1, 2] = torch.nextafter(model.weight[1, 2], torch.tensor(9.0))
    assert weights_digest([model]) != before
    assert weights_digest([model.bfloat16()]) != before
