"""The program, with ranks that end by SIGKILL at a place that no watcher could hit from outside.

torchrun ... killed_at.py CONFIG.toml [--field value ...]

PZ_TEST_KILLS is JSON: {"1": [0, "update", 5]} ends rank 0 of the first restart in its first update from step 5 on.
update: gradients are reduced, the weights not yet written; save: half of this rank's pieces of the step's checkpoint are
written; seal: all files of that checkpoint are on disk, and it does not stand yet (rank 0); push: servers have a part of
the weights of that version, and wait for the next (rank 0).
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from megatron_pz.train import launch as program

LEAST_PIECES = 4


def end():
    os.kill(os.getpid(), signal.SIGKILL)


def in_update(step):
    from megatron_pz.train.step import Trainer

    right = Trainer.step

    def update(trainer, plan, *, lr_step, **given):
        if lr_step >= step:
            trainer.optimizer.step = end
        return right(trainer, plan, lr_step=lr_step, **given)

    Trainer.step = update


def in_save(step):
    from megatron_pz.checkpoint import store

    right = store.write_files

    def write(pieces, folder, *args):
        if Path(folder).parent.name == f".tmp-step_{step:06d}":
            assert len(pieces) >= LEAST_PIECES
            right(pieces[: len(pieces) // 2], folder, *args)
            end()
        return right(pieces, folder, *args)

    store.write_files = write


def in_seal(step):
    from megatron_pz.checkpoint import store

    right = store.sync_files

    def sync(folder, known):
        right(folder, known)
        if folder.name == f".tmp-step_{step:06d}":
            end()

    store.sync_files = sync


def in_push(version):
    from megatron_pz.engine.sglang.control import Control
    from megatron_pz.sync import collective
    from megatron_pz.sync.push import WeightPush

    right, told = WeightPush.__call__, {"parts": 0}

    def push(self, weights, at, servers):
        told["is_due"] = at >= version
        return right(self, weights, at, servers)

    def second(function, wait_s=0.0):
        def call(*args, **given):
            told["parts"] += told["is_due"]
            if told["parts"] == 2:
                time.sleep(wait_s)
                end()
            return function(*args, **given)

        return call

    WeightPush.__call__ = push
    Control.update_weights_from_tensor = second(Control.update_weights_from_tensor)
    collective.joined = second(collective.joined, 0.5)  # by then the servers wait for the broadcast


if __name__ == "__main__":
    kills = json.loads(os.environ.get("PZ_TEST_KILLS", "{}"))
    rank, place, at = kills.get(os.environ["TORCHELASTIC_RESTART_COUNT"], (None, "", 0))
    if rank == int(os.environ["RANK"]):
        {"update": in_update, "save": in_save, "seal": in_seal, "push": in_push}[place](at)
    sys.exit(program.main(sys.argv[1:]))
