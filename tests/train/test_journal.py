"""What goes on record about a step and about the run."""

import io
import json
import tomllib

import pytest
from builders import group, rollout

from megatron_pz import __version__
from megatron_pz.config.schema import Config, ReportConfig, TaskConfig
from megatron_pz.errors import DiskError, ReportError
from megatron_pz.report.alarms import Watch
from megatron_pz.report.console import Console
from megatron_pz.report.timers import Timers
from megatron_pz.report.writers import RunWriter
from megatron_pz.train.journal import RunJournal, describe_run, hashes, write_whole
from megatron_pz.train.play import Round
from megatron_pz.types import Role, UpdateResult

DRAWN = {"epoch": 0.25, "num_paragraphs": 2.0}
GROUPS = [group([rollout(reward=1.0), rollout(reward=0.0, answer="Rome")]), group([rollout(Role.GENERATOR, 0.5)] * 2)]


@pytest.fixture
def journal(tmp_path):
    out = io.StringIO()
    writer = RunWriter(tmp_path, tensorboard=False)
    yield RunJournal(writer, Console(10, stream=out), Config(report=ReportConfig(show_rollouts=1))), tmp_path, out
    writer.close()


@pytest.fixture
def sounding():
    """Three records, and at the third an alarm."""
    return [{"step": step, "truncated_share/mask": 0.5} for step in (1, 2, 3)]


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_step_is_recorded_with_what_the_round_the_update_and_the_clock_say(journal):
    book, folder, out = journal
    clock = iter([0.0, 1.0, 3.0, 5.0])
    timers = Timers(lambda: next(clock))
    with timers("train"):
        pass
    update = UpdateResult(True, 0.5, 2.0, 1e-4, {"tokens/trained": 9.0})
    book.write(3, DRAWN, Round(GROUPS, (), {"mask/valid_rate": 0.5}), update, {}, timers)
    [row] = lines(folder / "metrics.jsonl")
    assert row.pop("memory/rss_bytes") > 10_000_000  # a Python process
    tokens = sum(len(r.completion.token_ids) for g in GROUPS for r in g.rollouts)
    assert row == {
        "step": 3,
        **DRAWN,
        "mask/valid_rate": 0.5,
        "tokens/generated": tokens,
        "lr": 1e-4,
        "loss": 0.5,
        "grad_norm": 2.0,
        "tokens/trained": 9.0,
        "time/train_s": 2.0,
        "time/step_s": 5.0,
        "alarms/sounding": 0.0,
    }
    written = lines(folder / "rollouts.jsonl")
    assert [r["reward"] for r in written] == [1.0, 0.0, 0.5, 0.5]
    assert {r["step"] for r in written} == {3}
    assert "step  3/10" in out.getvalue() and "prediction" not in out.getvalue()


def test_an_alarm_is_told_when_it_first_sounds_and_counted_while_it_does(journal, sounding):
    book, folder, out = journal
    for row in [*sounding, {"step": 4, "truncated_share/mask": 0.5}]:
        book.write(row["step"], DRAWN, Round(GROUPS, (), {"truncated_share/mask": 0.5}), None, {}, Timers())
    assert [row["alarms/sounding"] for row in lines(folder / "metrics.jsonl")] == [0, 0, 1, 1]
    assert out.getvalue().count("alarm truncation at step 3: ") == out.getvalue().count("alarm ") == 1


def test_a_continued_run_does_not_tell_an_alarm_again(tmp_path, sounding):
    out = io.StringIO()
    writer = RunWriter(tmp_path, step=3, tensorboard=False)
    book = RunJournal(writer, Console(10, stream=out), Config(), Watch(sounding))
    book.write(4, DRAWN, Round(GROUPS, (), {"truncated_share/mask": 0.5}), None, {}, Timers())
    writer.close()
    assert lines(tmp_path / "metrics.jsonl")[0]["alarms/sounding"] == 1 and "alarm" not in out.getvalue()


def test_a_step_without_an_update_has_no_loss(journal):
    book, folder, _ = journal
    book.write(1, DRAWN, Round((), ()), UpdateResult(False, 0.0, 0.0, 1e-4), {}, Timers())
    [row] = lines(folder / "metrics.jsonl")
    assert row["lr"] == 1e-4
    assert not {"loss", "grad_norm", "tokens/generated"} & set(row)
    assert lines(folder / "rollouts.jsonl") == []


def test_a_score_before_the_first_step_stands_alone(journal):
    book, folder, _ = journal
    book.write(0, {}, None, None, {"eval/fixed_masks/accuracy": 0.5}, Timers())
    [row] = lines(folder / "metrics.jsonl")
    assert set(row) == {"step", "eval/fixed_masks/accuracy", "time/step_s", "memory/rss_bytes", "alarms/sounding"}


def test_games_are_shown_at_steps_that_score(journal):
    book, _, out = journal
    book.write(2, DRAWN, Round(GROUPS, ()), None, {"eval/fixed_masks/accuracy": 0.5}, Timers())
    assert "[[Paris]] is the capital" in out.getvalue() and "wrong" in out.getvalue()


def test_games_of_a_step_are_judged_by_the_task_of_that_step(journal):
    book, _, out = journal
    task = TaskConfig(task="random_span", warm_up_task="format_only", warm_up_task_steps=2)
    book = RunJournal(book.writer, book.console, Config(report=ReportConfig(show_rollouts=1), task=task))
    for step in (2, 3):
        book.write(step, DRAWN, Round(GROUPS[:1], ()), None, {"eval/fixed_masks/accuracy": 0.5}, Timers())
    words = [line.split()[1] for line in out.getvalue().splitlines() if line.startswith("  prediction")]
    assert words == ["readable", "unreadable", "right", "wrong"]


def test_a_metric_that_no_table_knows_is_refused_before_rollouts_are_written(journal):
    book, folder, _ = journal
    with pytest.raises(ReportError, match="mask/validrate"):
        book.write(1, DRAWN, Round(GROUPS, (), {"mask/validrate": 1.0}), None, {}, Timers())
    assert (folder / "metrics.jsonl").read_bytes() == (folder / "rollouts.jsonl").read_bytes() == b""


def test_a_silent_rank_forgets_its_seconds():
    clock = iter([0.0, 5.0, 7.0])
    timers = Timers(lambda: next(clock))
    RunJournal(None, Console(10, enabled=False), Config()).write(1, DRAWN, None, None, {}, timers)
    assert timers.lap()["time/step_s"] == 2.0


def test_the_run_says_what_it_was(tmp_path):
    (tmp_path / "text.jsonl").write_bytes(b"abc")
    found = hashes([tmp_path / "text.jsonl", tmp_path / "none"])
    # echo -n abc | sha256sum
    assert found == {"text.jsonl": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}
    describe_run(Config(), tmp_path / "run", {"model": "m", "hashes": found})
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["megatron_pz"] == __version__ and about["hashes"] == found and about["model"] == "m"
    assert about["versions"]["torch"] and about["python"].startswith("3.")
    assert about["commit"] is None or len(about["commit"]) == 40
    assert tomllib.loads((tmp_path / "run" / "config.toml").read_text())["train"]["train_iters"] == 2000


def test_a_small_file_is_replaced_whole_or_not_at_all(tmp_path):
    write_whole(tmp_path / "a.txt", "old")
    write_whole(tmp_path / "a.txt", "new")
    (tmp_path / "b.txt").mkdir()
    with pytest.raises(DiskError, match="b.txt cannot be written: Is a directory.*--run-dir"):
        write_whole(tmp_path / "b.txt", "text")
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "b.txt"}
    assert (tmp_path / "a.txt").read_text() == "new"
