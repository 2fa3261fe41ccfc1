"""Two data-parallel ranks save in the foreground, in the background, and where one rank's disk refuses.

torchrun --nproc-per-node 2 save_worker.py FOLDER

FOLDER/plain and FOLDER/background get checkpoints of the same state. FOLDER/report.json: for each rank what it was told.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from demo_runs import files_of_at_most
from gradients import Case, build

from megatron_pz.checkpoint.store import CheckpointStore
from megatron_pz.errors import CheckpointError, DiskError
from megatron_pz.train.parallel import shutdown


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    parallel, trainer, plan = build(Case("dense", updated=True))
    trainer.step(plan, lr_step=1)
    stores = {name: CheckpointStore(folder / name, 1, parallel.control_group) for name in ("plain", "background")}
    plain, store = stores.values()
    told = {"plain": str(plain.save(1, trainer.chunks, trainer.optimizer, "{}"))}
    told["at once"] = str(store.save(1, trainer.chunks, trainer.optimizer, "{}", in_background=True))
    trainer.step(plan, lr_step=2)
    polls = 0
    while (found := store.settle(wait=False)) is None:
        polls += 1
    told["background"] = str(found)

    def refused() -> str:
        try:
            store.save(2, trainer.chunks, trainer.optimizer, "{}", in_background=True)
            store.settle(wait=True)
        except DiskError as error:
            return str(error)
        return "nothing"

    if parallel.rank == 1:
        with files_of_at_most(20_000):
            told["refused"] = refused()
    else:
        told["refused"] = refused()
    told["left"] = sorted(path.name for path in store.folder.iterdir())

    (copy := folder / "damaged").mkdir(exist_ok=True)
    if parallel.rank == 0:
        whole = store.folder / "step_000001"
        for path in whole.rglob("*"):
            target = copy / "step_000001" / path.relative_to(whole)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file():
                target.write_bytes(path.read_bytes())
        for name in ("shards/__0_0.distcp", "shards/__1_0.distcp"):  # of which each rank reads one
            file = copy / "step_000001" / name
            file.write_bytes(file.read_bytes()[:-1] + b"?")
    dist.barrier()
    try:
        CheckpointStore(copy, 1, parallel.control_group).load(1, trainer.chunks, trainer.optimizer)
    except CheckpointError as error:
        told["damaged"] = str(error)
    everywhere: list[dict[str, str] | None] = [None, None]
    dist.all_gather_object(everywhere, told)
    shutdown()
    if os.environ["RANK"] == "0":
        (folder / "report.json").write_text(json.dumps(everywhere))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
