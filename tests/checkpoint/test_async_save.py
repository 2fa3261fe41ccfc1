"""Saves in the background, one process: what appears when, what it holds, and what a failure or a kill leaves."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from demo_runs import files_of_at_most, tree
from small_trainer import CONFIG, PLATFORM, losses, new_trainer, save, weights

from megatron_pz.checkpoint.store import CheckpointStore
from megatron_pz.errors import DiskError


@contextmanager
def slow_disk(store):
    """Within the block the store's files wait for their turn."""
    turn = threading.Event()
    store._writer.submit(turn.wait)
    try:
        yield
    finally:
        turn.set()


def test_it_appears_when_its_files_are_whole_and_holds_the_state_of_when_it_was_asked_for(trainer, tmp_path):
    store = CheckpointStore(tmp_path / "background", keep=1)
    save(store, 1, trainer)
    losses(trainer, 1)
    wanted = weights(trainer)
    save(plain := CheckpointStore(tmp_path / "plain", keep=1), 2, trainer)
    with slow_disk(store):
        assert save(store, 2, trainer, in_background=True) is None
        losses(trainer, 2)
        assert store.settle(wait=False) is None and store.is_saving
        assert store.steps() == [1]  # the older one goes after the new one stands
    assert store.settle(wait=True).name == "step_000002" and not store.is_saving
    assert store.steps() == [2] and sorted(path.name for path in store.folder.iterdir()) == ["step_000002"]
    assert tree(store.folder) == tree(plain.folder)
    store.load(2, trainer.chunks, trainer.optimizer)
    assert all(bool((wanted[name] == value).all()) for name, value in weights(trainer).items())


def test_the_room_for_the_copy_is_taken_once(trainer, tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    rooms = set()
    for step in (1, 2):
        save(store, step, trainer, in_background=True)
        rooms.add(store._copy._room.data_ptr())
        store.settle(wait=True)
    parameters = sum(value.numel() for value in weights(trainer).values())
    assert len(rooms) == 1 and 12 * parameters <= store._copy.num_bytes < 12 * parameters + 64 * 60


def test_hosts_without_memory_for_a_copy_write_at_once_and_say_so(trainer, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_pz.checkpoint.store.available_memory", lambda: 1000)
    told = []
    store = CheckpointStore(tmp_path, keep=1)
    assert save(store, 1, trainer, in_background=True, tell=told.append).name == "step_000001"
    assert len(told) == 1 and "no memory for a copy" in told[0]


def test_a_failed_write_is_told_when_it_is_settled_and_leaves_nothing(trainer, tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    save(store, 1, trainer)
    before = tree(tmp_path)
    with files_of_at_most(20_000):
        save(store, 2, trainer, in_background=True)
        with pytest.raises(DiskError, match="step_000002: the checkpoint could not be written .File too large.*Older"):
            store.settle(wait=True)
    assert tree(tmp_path) == before and [path.name for path in tmp_path.iterdir()] == ["step_000001"]
    save(store, 2, trainer, in_background=True)
    assert store.settle(wait=True).name == "step_000002"


def test_closing_finishes_what_one_process_was_writing(trainer, tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    save(store, 1, trainer, in_background=True)
    store.close()
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


def test_a_process_killed_while_it_writes_in_the_background_leaves_the_older_checkpoint_whole(trainer, tmp_path):
    """kill -9 once the first file has begun; nothing goes on writing."""
    child = subprocess.Popen(
        [sys.executable, "-W", "ignore", __file__, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout.readline() == "writing\n"
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    (partial,) = tmp_path.glob(".tmp-*")
    assert partial.name == ".tmp-step_000002" and list(partial.glob("shards/*"))
    store = CheckpointStore(tmp_path, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]
    assert store.load(1, trainer.chunks, trainer.optimizer) == '{"step": 1}'


def _stop_half_way(folder):
    """Save once, then in the background on a disk that stops after the first file was opened."""
    from megatron_pz.checkpoint import writer
    from megatron_pz.train.parallel import init_parallel

    one = new_trainer(init_parallel(CONFIG.parallel, PLATFORM, seed=1))
    store = CheckpointStore(folder, keep=1)
    save(store, 1, one)
    stock = writer.write_piece

    def stuck(file, place, value):
        stock(file, place, value)
        sys.stdout.write("writing\n")
        sys.stdout.flush()
        time.sleep(1000)

    writer.write_piece = stuck
    save(store, 2, one, in_background=True)
    store.settle(wait=True)


if __name__ == "__main__":
    _stop_half_way(Path(sys.argv[1]))
