"""The store in one process, on a tiny Qwen3: what comes back, what is kept, what a kill leaves."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_trainer import CONFIG, PLATFORM, TINY, losses, new_trainer, save, weights

from megatron_pz.checkpoint.store import CheckpointStore
from megatron_pz.errors import CheckpointError, DiskError


@pytest.mark.parametrize("num_updates", [0, 3])
def test_what_was_saved_comes_back_to_the_bit_and_learns_on_as_it_would_have(parallel, trainer, tmp_path, num_updates):
    losses(trainer, num_updates)  # 0: saved before any update was applied
    store = CheckpointStore(tmp_path, keep=2)
    assert save(store, 7, trainer).name == "step_000007"
    saved, wanted = weights(trainer), losses(trainer, 3)

    other = new_trainer(parallel, seed=2)
    assert not all(torch.equal(saved[name], value) for name, value in weights(other).items())
    losses(other, 1)
    assert CheckpointStore(tmp_path, keep=2).load(7, other.chunks, other.optimizer) == '{"step": 7}'
    assert all(torch.equal(saved[name], value) for name, value in weights(other).items())
    assert losses(other, 3) == wanted


def test_the_newest_are_kept_and_a_rescued_state_pushes_none_out(trainer, tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (2, 4, 6):
        save(store, step, trainer)
    assert store.steps() == [4, 6]
    save(store, 7, trainer, drops_old=False)
    assert store.steps() == [4, 6, 7]
    save(store, 10, trainer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000007", "step_000010"]


def test_a_step_that_is_saved_again_is_replaced_whole(trainer, tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    save(store, 1, trainer)
    losses(trainer, 1)
    save(store, 1, trainer)
    wanted = weights(trainer)
    losses(trainer, 1)
    store.load(1, trainer.chunks, trainer.optimizer)
    assert all(torch.equal(wanted[name], value) for name, value in weights(trainer).items())
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


def test_what_a_killed_save_left_is_removed_at_the_next_start_and_other_folders_stay(trainer, tmp_path):
    save(CheckpointStore(tmp_path, keep=2), 2, trainer)
    for leftover in (".tmp-step_000004", ".trash-step_000001"):
        (tmp_path / leftover / "shards").mkdir(parents=True)
        (tmp_path / leftover / "shards" / "__0_0.distcp").write_bytes(b"half")
    (tmp_path / "step_000003.moved_away").mkdir()
    (tmp_path / "step_best").mkdir()
    store = CheckpointStore(tmp_path, keep=2)
    assert store.steps() == [2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000002", "step_000003.moved_away", "step_best"]


def test_a_process_killed_while_it_saves_leaves_the_older_checkpoint_whole(trainer, tmp_path):
    """kill -9 as soon as the next save has begun to write."""
    folder = tmp_path / "checkpoints"
    child = subprocess.Popen(
        [sys.executable, "-W", "ignore", __file__, str(folder)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )
    try:
        began = time.monotonic()
        while not list(folder.glob(".tmp-step_00000[2-9]/shards/*")):
            assert child.poll() is None and time.monotonic() - began < 150
            time.sleep(0.005)
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    store = CheckpointStore(folder, keep=9)
    assert store.steps() and not list(folder.glob(".tmp-*"))
    newest = store.steps()[-1]
    assert store.load(newest, trainer.chunks, trainer.optimizer) == f'{{"step": {newest}}}'


def test_a_checkpoint_of_another_model_is_refused_and_nothing_is_loaded(parallel, trainer, tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    save(store, 1, trainer)
    other = new_trainer(parallel, {**TINY, "intermediate_size": 32})
    before = weights(other)
    with pytest.raises(CheckpointError, match="step_000001 belongs to another model"):
        store.load(1, other.chunks, other.optimizer)
    assert all(torch.equal(before[name], value) for name, value in weights(other).items())


def test_a_damaged_checkpoint_loads_nothing_and_names_one_that_is_whole(trainer, tmp_path):
    store = CheckpointStore(tmp_path, keep=3)
    for step in (1, 2, 3):
        save(store, step, trainer)
    for step in (2, 3):
        (tmp_path / f"step_{step:06d}" / "manifest.json").unlink()
    losses(trainer, 1)
    before = weights(trainer)
    with pytest.raises(
        CheckpointError, match="no readable manifest.json.* step_000001 is whole: move step_000003 away"
    ):
        store.load(3, trainer.chunks, trainer.optimizer)
    assert all(torch.equal(before[name], value) for name, value in weights(trainer).items())


def test_a_place_that_cannot_be_written_is_a_disk_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="Not a directory.*--run-dir"):
        CheckpointStore(tmp_path / "file" / "checkpoints", keep=1)


def _save_for_ever(folder):
    from megatron_pz.train.parallel import init_parallel

    place = init_parallel(CONFIG.parallel, PLATFORM, seed=1)
    one = new_trainer(place)
    store = CheckpointStore(folder, keep=9)
    for step in range(1, 10):
        save(store, step, one)


if __name__ == "__main__":
    _save_for_ever(Path(sys.argv[1]))
