"""`--async-save`: the same run to the last bit, and a run that ends well or badly while a checkpoint is being written."""

import os
import signal
import threading

import pytest
from demo_runs import checkpoints, files_of_at_most, rows, run, tiny_policy, tree, write_text

from megatron_pz.platform.select import select_platform

select_platform("cpu")  # before Megatron is imported

from megatron_pz.checkpoint import store  # noqa: E402


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    policy = tiny_policy(folder / "policy")
    settings = {"hf_model": policy, "init": "random", "task": "continue_pt", "save_interval": 2, "keep": 9}
    return write_text(folder / "text.jsonl"), settings


def numbers(folder):
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in rows(folder)]


def test_the_run_and_its_checkpoints_are_the_same_to_the_bit(tmp_path, given, capsys):
    corpus, settings = given
    for name, is_async in (("a", True), ("b", False)):
        assert run(tmp_path / name, corpus, **settings, train_iters=5, async_save=is_async) == 0
    assert checkpoints(tmp_path / "a") == ["step_000002", "step_000004", "step_000005"]
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")
    assert tree(tmp_path / "a" / "checkpoints") == tree(tmp_path / "b" / "checkpoints")
    said = capsys.readouterr().out
    assert all(said.count(f"checkpoint {tmp_path / name / 'checkpoints' / 'step_000004'}") == 1 for name in "ab")


def test_a_signal_while_a_checkpoint_is_being_written_finishes_it_and_saves_the_last_step(tmp_path, given, monkeypatch):
    corpus, settings = given
    signalled = threading.Event()
    stock = store.write_files

    def asked_to_stop(*args):
        if not signalled.is_set():  # in the writer's thread; the main thread trains on
            signalled.set()
            os.kill(os.getpid(), signal.SIGTERM)
        return stock(*args)

    monkeypatch.setattr(store, "write_files", asked_to_stop)
    assert run(tmp_path, corpus, **settings, train_iters=100_000, async_save=True) == 0
    last = int(rows(tmp_path)[-1]["step"])
    assert 2 <= last < 100 and checkpoints(tmp_path) == [f"step_{step:06d}" for step in sorted({2, last})]
    assert run(tmp_path, corpus, **settings, train_iters=last + 1, async_save=True) == 0
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, last + 2))


def test_a_background_write_that_fails_stops_the_run_with_a_disk_error(tmp_path, given, capsys):
    corpus, settings = given
    assert run(tmp_path, corpus, **settings, train_iters=2) == 0
    before = tree(tmp_path / "checkpoints")
    capsys.readouterr()
    with files_of_at_most(200_000):
        assert run(tmp_path, corpus, **settings, train_iters=20, async_save=True) == 2
    said = capsys.readouterr().err
    assert f"DiskError: {tmp_path / 'checkpoints' / 'step_000004'}: the checkpoint could not be written" in said
    assert "File too large" in said and "Traceback" not in said
    assert tree(tmp_path / "checkpoints") == before
