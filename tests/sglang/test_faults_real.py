"""A run that starts its own server, loses it to `kill -9` in one round, is itself killed in the next, and goes on by the
same command: what is learned from is whole, and nothing counts twice."""

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

import psutil
import pytest
from demo_runs import ROOT, TEXT, arguments, rows, write_text

from megatron_pz.checkpoint.completion_lines import completions, read_lines
from megatron_pz.checkpoint.journal import CompletionJournal

MASKS, PREDICTIONS, STEPS = 6, 8, 3
ENOUGH = 8  # completions of a round that are on disk when it is disturbed
LIMIT_S = 280.0  # a server starts within 30 s on an idle machine, and there are up to two starts in a wait

pytestmark = pytest.mark.timeout(900)
FLAGS = {
    "engine": "sglang",
    "n_masks_per_paragraph": MASKS,
    "n_predictions_per_mask": PREDICTIONS,
    "max_running_requests": 3,  # a round takes seconds
    "train_iters": STEPS,
    "save_interval": 1,
    "keep": 10,
    "lr": 1e-3,  # so much that weights of another step would show
}


@dataclass
class Story:
    """What the run left behind, and what was seen on the way."""

    run_dir: object
    told: str = ""
    of_killed_server: set = field(default_factory=set)
    on_disk_when_server_was_killed: list = field(default_factory=list)
    left_by_trainer: list = field(default_factory=list)
    on_disk_when_trainer_was_killed: list = field(default_factory=list)
    metrics_when_trainer_was_killed: list = field(default_factory=list)

    def answers(self, step):
        return completions(read_lines(CompletionJournal(self.run_dir / "journal").path(step)))


def wait(is_so, run, log):
    deadline = time.monotonic() + LIMIT_S
    while not is_so():
        assert run.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.01)


def servers_of(run):
    """Supervisor, server, scheduler, detokenizer, resource tracker."""
    (supervisor,) = [
        one for one in psutil.Process(run.pid).children() if any("supervisor.py" in w for w in one.cmdline())
    ]
    return [supervisor, *supervisor.children(recursive=True)]


def scheduler_of(run):
    (found,) = [one for one in servers_of(run) if one.name().startswith("sglang::sched")]
    return found


@pytest.fixture(scope="module")
def begin(server_python, tmp_path_factory):
    """begin(folder, ...) -> the run, whose words are in `folder`/log; the same once more goes on with it."""
    started = []

    def start(folder, **flags):
        corpus = write_text(folder / "text.jsonl", TEXT * 4)
        given = {"server_python": server_python, **FLAGS, **flags}
        command = [sys.executable, "-W", "ignore", "-m", "megatron_pz", *arguments(folder / "run", corpus, **given)]
        with (folder / "log").open("ab") as out:
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            started.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT))
        return started[-1]

    yield start
    for run in started:
        run.kill()
        run.wait()


@pytest.fixture(scope="module")
def story(begin, tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    log, told = folder / "log", Story(folder / "run")
    run = begin(folder)
    wait(lambda: len(told.answers(2)) >= ENOUGH, run, log)
    told.of_killed_server = {one.pid for one in servers_of(run)}
    scheduler_of(run).send_signal(signal.SIGKILL)
    told.on_disk_when_server_was_killed = told.answers(2)

    wait(lambda: len(told.answers(3)) >= ENOUGH, run, log)
    below = psutil.Process(run.pid).children(
        recursive=True
    )  # the supervisor and its server: checkpoints are written by threads
    run.send_signal(signal.SIGKILL)
    run.wait()
    told.on_disk_when_trainer_was_killed = told.answers(3)
    told.metrics_when_trainer_was_killed = rows(told.run_dir)
    _, told.left_by_trainer = psutil.wait_procs(below, timeout=30)

    run = begin(folder)
    assert run.wait(LIMIT_S) == 0, log.read_text()[-4000:]
    told.told = log.read_text()
    return told


def test_every_step_is_learned_from_once(story):
    assert [row["step"] for row in rows(story.run_dir)] == list(range(1, STEPS + 1))
    rollouts = rows(story.run_dir, "rollouts.jsonl")
    for step in range(1, STEPS + 1):
        of_step = [row for row in rollouts if row["step"] == step]
        masks = {row["mask_id"]: row["valid"] for row in of_step if row["role"] == "mask"}
        assert set(masks) == {f"{step}.{place}.{index}" for place in range(2) for index in range(MASKS)}
        counts = Counter((row["role"], row["mask_id"]) for row in of_step)
        expected = {("mask", mask): 1 for mask in masks}
        expected |= {("prediction", mask): PREDICTIONS for mask, is_valid in masks.items() if is_valid}
        assert counts == expected


def test_no_request_was_answered_twice(story):
    rollouts = Counter(row["step"] for row in rows(story.run_dir, "rollouts.jsonl"))
    for step in range(2, STEPS + 1):  # the record of the first is useless once it is learned from
        keys = [found.key for found in story.answers(step)]
        assert len(set(keys)) == len(keys) == rollouts[step]


def test_every_token_is_of_the_weights_that_its_step_began_with(story):
    """A server that comes back has those of its folder, version 0, until it is given the others."""
    metrics = rows(story.run_dir)
    updates = ["grad_norm" in row for row in metrics]
    rollouts = rows(story.run_dir, "rollouts.jsonl")
    for step, row in enumerate(metrics, start=1):
        assert {one["weight_version"] for one in rollouts if one["step"] == step} == {sum(updates[: step - 1])}
        if updates[step - 1]:
            assert row["mismatch/max_abs"] < 1e-4
            assert row["staleness/max"] == 0
    assert sum(updates[:2]) >= 1  # else a server could have had the weights of its folder
    print("\nlargest difference:", [f"{row['mismatch/max_abs']:.0e}" for row in metrics if "mismatch/max_abs" in row])


def test_a_server_that_was_killed_is_started_again_and_only_what_it_had_not_answered_is_asked_again(story):
    before, first_run = story.on_disk_when_server_was_killed, story.told.split("continuing after step")[0]
    assert len(before) >= ENOUGH and story.answers(2)[: len(before)] == before
    assert len(re.findall("SGLang server 0 at .* was lost", first_run)) == 1
    assert len(re.findall("SGLang server 0 is back", first_run)) == 1
    assert not [pid for pid in story.of_killed_server if psutil.pid_exists(pid)]


def test_a_trainer_that_was_killed_leaves_no_server_and_goes_on_in_the_middle_of_its_step(story):
    assert story.left_by_trainer == []
    assert [row["step"] for row in story.metrics_when_trainer_was_killed] == [1, 2]
    before, after = story.on_disk_when_trainer_was_killed, story.answers(3)
    assert ENOUGH <= len(before) < len(after)
    assert after[: len(before)] == before
    assert "continuing after step 2" in story.told


@pytest.mark.slow  # starts three servers
def test_with_samples_that_leave_nothing_to_chance_a_killed_server_changes_no_rollout(begin, tmp_path):
    """At so low a temperature every sample is the likeliest token: that, and no seed, is what a server on a CPU repeats
    (docs/faq.md). A group of equals teaches nothing, so the weights stay."""
    stories = {}
    for name in ("disturbed", "whole"):
        (tmp_path / name).mkdir()
        run, log = begin(tmp_path / name, temperature=1e-4, train_iters=2), tmp_path / name / "log"
        stories[name] = Story(tmp_path / name / "run")
        if name == "disturbed":
            wait(lambda: len(stories["disturbed"].answers(2)) >= ENOUGH, run, log)
            scheduler_of(run).send_signal(signal.SIGKILL)
        assert run.wait(LIMIT_S) == 0, log.read_text()[-4000:]
        assert len(re.findall("SGLang server 0 at .* was lost", log.read_text())) == (name == "disturbed")
    disturbed, whole = (rows(story.run_dir, "rollouts.jsonl") for story in stories.values())
    assert disturbed == whole and {row["step"] for row in whole} == {1, 2}
    print(f"\n{len(whole)} rollouts alike")


@pytest.mark.slow
def test_a_server_that_hangs_is_started_again(begin, tmp_path):
    run, log, story = begin(tmp_path, train_iters=2, request_timeout_s=2), tmp_path / "log", Story(tmp_path / "run")
    wait(lambda: len(story.answers(2)) >= ENOUGH, run, log)
    scheduler_of(run).send_signal(signal.SIGSTOP)
    assert run.wait(LIMIT_S) == 0, log.read_text()[-4000:]
    assert len(re.findall("SGLang server 0 at .* was lost", log.read_text())) == 1
    keys = [found.key for found in story.answers(2)]
    assert len(set(keys)) == len(keys) == sum(row["step"] == 2 for row in rows(story.run_dir, "rollouts.jsonl"))
