"""A checkpoint of one layout read under another, four ranks, all in one run of torchrun.

torchrun --nproc-per-node 4 reshard_worker.py FOLDER

For each pair: two updates under the first layout, a checkpoint between them; the second update again, under the other layout,
from the checkpoint. FOLDER/report.json: what `gradients.compare` says of the weights of the two.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gradients import Case, build, whole

from megatron_pz.checkpoint.store import CheckpointStore
from megatron_pz.models.shards import complete_weights
from megatron_pz.train.parallel import shutdown

TP2, CP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}, {"context_parallel_size": 2}
VPP2 = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
EP2, ETP2 = {"expert_model_parallel_size": 2}, {"expert_tensor_parallel_size": 2}
OVERLAPPED = {"overlap_grad_reduce": True, "overlap_param_gather": True}
PAIRS: dict[str, tuple[Case, dict[str, Any]]] = {
    "cp2 vpp2 to tp2 sp": (Case("nope", CP2 | VPP2, layers=4, updated=True), TP2),
    "tp2 sp, overlapped, to cp2 vpp2": (Case("nope", TP2, layers=4, updated=True, ddp=OVERLAPPED), CP2 | VPP2),
    "moe tp2 sp etp2 ep2 to vpp2 ep2": (Case("moe", TP2 | EP2 | ETP2, layers=4, updated=True), VPP2 | EP2),
    "moe cp2 vpp2 ep2 to tp2 sp etp2 ep2": (Case("moe", CP2 | VPP2 | EP2, layers=4, updated=True), TP2 | EP2 | ETP2),
}


def run(name: str, folder: Path) -> dict[str, float]:
    case, layout = PAIRS[name]
    parallel, trainer, plan = build(case)
    trainer.step(plan, lr_step=1)
    store = CheckpointStore(folder / name, 1, parallel.control_group)
    store.save(1, trainer.chunks, trainer.optimizer, "{}")
    complete_weights(trainer.chunks)
    saved = whole(trainer.chunks, "data")
    trainer.step(plan, lr_step=2)
    complete_weights(trainer.chunks)
    wanted = whole(trainer.chunks, "data")
    shutdown()

    parallel, trainer, plan = build(replace(case, layout=layout))
    CheckpointStore(folder / name, 1, parallel.control_group).load(1, trainer.chunks, trainer.optimizer)
    loaded = whole(trainer.chunks, "data")
    trainer.step(plan, lr_step=2)
    complete_weights(trainer.chunks)
    found = whole(trainer.chunks, "data")
    shutdown()
    changes = {key: (found[key] - value, value - saved[key]) for key, value in wanted.items()}
    return {
        "loaded": float(sum(not torch.equal(loaded[key], value) for key, value in saved.items())),
        "change": sum(float(off.norm()) ** 2 for off, _ in changes.values()) ** 0.5
        / sum(float(change.norm()) ** 2 for _, change in changes.values()) ** 0.5,
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    report = {name: run(name, folder) for name in PAIRS}
    if os.environ["RANK"] == "0":
        (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
