"""torchrun's restarts of two ranks whose servers the run starts: a rank lost in a round, in an update, in a save."""

import json
import os
import re
import signal
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from demo_runs import ROOT, TEXT, arguments, checkpoints, rows, write_text
from torchrun_runs import end, environments, metrics, of_start, rank_process, start, wait_until

from megatron_pz.checkpoint.completion_lines import completions, read_lines
from megatron_pz.checkpoint.journal import CompletionJournal
from megatron_pz.engine.sglang.fleet import free_port

MASKS, PREDICTIONS, STEPS = 6, 8, 6
ENOUGH = 8  # completions of a round that are on disk when it is disturbed
LIMIT_S = 400.0  # until a place is reached: two ranks and a server start within 40 s on an idle machine
PROGRAM = str(ROOT / "tests" / "sglang" / "killed_at.py")
FLAGS = {
    "engine": "sglang",
    "n_masks_per_paragraph": MASKS,
    "n_predictions_per_mask": PREDICTIONS,
    "max_running_requests": 3,  # a round takes seconds
    "save_interval": 1,
    "keep": 20,
    "lr": 1e-3,  # so much that weights of another step would show
    "async_save": True,
}
BY_THEMSELVES = {"2": (1, "update", 4), "3": (1, "save", 4), "4": (0, "seal", 4)}
CONTINUED = (1, 2, 2, 3, 3)
"""By restart, the step it goes on after. A checkpoint in the background stands when the next step is done."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]  # ten starts of servers and ranks


@dataclass
class Seen:
    """The run when a rank was lost."""

    metrics: list
    answers: dict  # by step
    folder: list  # of checkpoints
    processes: list  # ranks and servers
    num_supervisors: int
    left_at_next_start: list = field(default_factory=list)


@dataclass
class Story:
    run_dir: Path
    seen: list = field(default_factory=list)
    told: str = ""
    left: dict = field(default_factory=dict)

    def answers(self, step):
        return completions(read_lines(CompletionJournal(self.run_dir / "journal").path(step)))


def processes(run_dir):
    """Of the run: ranks, supervisors and servers, but not torchrun."""
    found = []
    for pid in environments(run_dir):
        with suppress(psutil.NoSuchProcess):
            one = psutil.Process(pid)
            if "torch.distributed.run" not in one.cmdline():
                found.append(one)
    return found


def is_supervisor(process):
    with suppress(psutil.NoSuchProcess):
        return any("supervisor.py" in word for word in process.cmdline())
    return False


def look(story, of_it, num_supervisors):
    answers = {step: story.answers(step) for step in range(1, STEPS + 1)}
    return Seen(metrics(story.run_dir), answers, checkpoints(story.run_dir), of_it, num_supervisors)


def wait_for_start(story, process):
    """Until the server of the next start answers; processes of this start. Those of the one before are noted where they are left."""
    log, count = story.run_dir / "out", len(story.seen)
    wait_until(lambda: log.read_text().count("SGLang serves at") > count, process, story.run_dir, LIMIT_S)
    if count:
        before = story.seen[-1]
        before.left_at_next_start = [one for one in before.processes if one.is_running()]
    of_it = processes(story.run_dir)
    return of_it, sum(map(is_supervisor, of_it))


@pytest.fixture(scope="module")
def begin(server_python):
    """begin(run_dir, ...) -> torchrun with two ranks, and their server on a port of the run's choice."""
    started = []

    def begun(run_dir, max_restarts=1, kills=None, **flags):
        corpus = write_text(run_dir.with_suffix(".jsonl"), TEXT * 4)
        given = {"server_python": server_python, "server_port": free_port("127.0.0.1"), **FLAGS, **flags}
        words = {"PZ_TEST_KILLS": json.dumps(kills or {}), "PYTHONWARNINGS": "ignore"}
        process = start(run_dir, [PROGRAM, *arguments(run_dir, corpus, **given)], max_restarts=max_restarts, **words)
        started.append((process, run_dir))
        return process

    yield begun
    end(started)


@pytest.fixture(scope="module")
def story(begin, tmp_path_factory):
    told = Story(tmp_path_factory.mktemp("elastic") / "run")
    process = begin(told.run_dir, max_restarts=5, kills=BY_THEMSELVES, train_iters=STEPS)

    def is_lost(count):
        return len(of_start(told.run_dir, count)) < 2 or bool(of_start(told.run_dir, count + 1))

    for rank, step in ((1, 3), (0, 4)):
        of_it = wait_for_start(told, process)
        wait_until(lambda at=step: len(told.answers(at)) >= ENOUGH, process, told.run_dir, LIMIT_S)
        os.kill(rank_process(process, rank), signal.SIGKILL)
        told.seen.append(look(told, *of_it))
    for count in map(int, BY_THEMSELVES):
        of_it = wait_for_start(told, process)
        wait_until(lambda at=count: is_lost(at), process, told.run_dir, LIMIT_S)
        told.seen.append(look(told, *of_it))
    wait_for_start(told, process)
    assert process.wait(LIMIT_S) == 0, (told.run_dir / "out").read_text()[-4000:]
    told.told = (told.run_dir / "out").read_text()
    told.left = environments(told.run_dir)
    return told


def test_each_restart_goes_on_after_the_newest_whole_checkpoint(story):
    assert [int(step) for step in re.findall(r"continuing after step (\d+)", story.told)] == [*CONTINUED]
    assert [int(n) for n in re.findall(r"torchrun has started the ranks again, time (\d)", story.told)] == [
        1,
        2,
        3,
        4,
        5,
    ]
    for seen in story.seen[3:]:  # in the middle of a save; all of its files were there, but it did not stand
        assert ".tmp-step_000004" in seen.folder and "step_000004" not in seen.folder
    assert checkpoints(story.run_dir) == [f"step_{step:06d}" for step in range(1, STEPS + 1)]


def test_of_no_start_a_process_is_left(story):
    """The port is the same each time, so that a server that was left would end the run, too."""
    for seen in story.seen:
        assert seen.num_supervisors == 1 < len(seen.processes)
        assert seen.left_at_next_start == []
    assert not story.left


def test_what_was_answered_before_a_kill_is_not_asked_again(story):
    rollouts = Counter(row["step"] for row in rows(story.run_dir, "rollouts.jsonl"))
    for seen in story.seen:
        for step, before in seen.answers.items():
            if step > 1:  # of the first no record is kept once it stands
                assert story.answers(step)[: len(before)] == before
    assert ENOUGH <= len(story.seen[0].answers[3]) < rollouts[3]
    assert len(story.seen[0].answers[3]) < len(story.answers(3))
    for step in range(2, STEPS + 1):
        keys = [found.key for found in story.answers(step)]
        assert len(set(keys)) == len(keys) == rollouts[step]


def test_a_step_that_is_done_again_has_the_same_numbers(story):
    """To the last bit: its responses are read back, and two ranks on a CPU add up in one order."""
    final = metrics(story.run_dir)
    assert [row["step"] for row in final] == list(range(1, STEPS + 1))
    for seen, after in zip(story.seen, CONTINUED, strict=True):
        assert seen.metrics == final[: len(seen.metrics)]
        print(f"\nat the kill {len(seen.metrics)} steps were on record, gone on after {after}")
    again = [row for seen, after in zip(story.seen, CONTINUED, strict=True) for row in seen.metrics[after:]]
    assert sum("grad_norm" in row for row in again) >= 3


def test_with_samples_that_leave_nothing_to_chance_a_lost_rank_changes_no_number(begin, tmp_path):
    """As docs/faq.md has it: at so low a temperature every sample is the likeliest token. A group of equals teaches nothing, so
    the weights stay."""
    stories = {name: Story(tmp_path / name) for name in ("whole", "disturbed")}
    for name, told in stories.items():
        process = begin(told.run_dir, temperature=1e-4, train_iters=2)
        if name == "disturbed":
            wait_until(lambda it=told: len(it.answers(2)) >= ENOUGH, process, told.run_dir, LIMIT_S)
            os.kill(rank_process(process, 1), signal.SIGKILL)
        assert process.wait(LIMIT_S) == 0, (told.run_dir / "out").read_text()[-4000:]
        restarts = (told.run_dir / "out").read_text().count("torchrun has started the ranks again")
        assert restarts == (name == "disturbed")
    whole, disturbed = (rows(told.run_dir, "rollouts.jsonl") for told in stories.values())
    assert disturbed == whole and {row["step"] for row in whole} == {1, 2}
    whole, disturbed = (metrics(told.run_dir) for told in stories.values())
    assert disturbed == whole
