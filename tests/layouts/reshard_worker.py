"""Checkpoints of one layout read under another, four ranks, all in one run of torchrun.

torchrun --nproc-per-node 4 reshard_worker.py FOLDER ["NAME to READER" ...]

For each way there are two updates under the first layout, a checkpoint between them; then under every other layout the second
update again, from the checkpoint. FOLDER/report.json: for each pair what `run` finds. Without pairs all are tried.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gradients import Case, build, whole

from megatron_pz.checkpoint.optimizer_state import MASTER, describe, held, step_of
from megatron_pz.checkpoint.places import places_of_range
from megatron_pz.checkpoint.store import CheckpointStore
from megatron_pz.models.shards import complete_weights, unwrap
from megatron_pz.train.parallel import shutdown

DP: dict[str, Any] = {}
TP2, CP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}, {"context_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = PP2 | {"virtual_pipeline_model_parallel_size": 2}
EP2, ETP2 = {"expert_model_parallel_size": 2}, {"expert_tensor_parallel_size": 2}
OVERLAPPED = {"overlap_grad_reduce": True, "overlap_param_gather": True}

Way = tuple[Case, dict[str, Case]]
"""What is saved, and what reads it."""


def way(case: Case, **readers: dict[str, Any]) -> Way:
    """Readers by name: a layout, and with `distributed` whether it shares out the optimizer."""
    cases = {}
    for name, given in readers.items():
        layout = dict(given)
        cases[name] = replace(case, ddp={}, distributed=layout.pop("distributed", True), layout=layout)
    return case, cases


WHOLE = {"distributed": False}
WAYS: dict[str, Way] = {
    "dp": way(
        Case("dense", DP, layers=4, updated=True),
        dp_whole=DP | WHOLE,
        tp2=TP2,
        pp2=PP2,
        cp2_vpp2=CP2 | VPP2,
        tp2_pp2_whole=TP2 | PP2 | WHOLE,
    ),
    "dp_whole": way(
        Case("untied", DP, layers=4, updated=True, distributed=False), dp=DP, tp2=TP2, vpp2_whole=VPP2 | WHOLE
    ),
    "tp2_overlapped": way(Case("nope", TP2, layers=4, updated=True, ddp=OVERLAPPED), dp=DP, cp2_vpp2=CP2 | VPP2),
    "tp2_pp2_whole": way(Case("dense", TP2 | PP2, layers=4, updated=True, distributed=False), dp=DP, cp2=CP2),
    "half_tp2": way(Case("dense", TP2, layers=4, updated=True, dtype="bfloat16"), dp=DP, pp2_whole=PP2 | WHOLE),
    "moe_dp": way(  # one optimizer; with experts shared out there are two
        Case("moe", DP, layers=4, updated=True),
        ep2=EP2,
        ep4={"expert_model_parallel_size": 4},
        tp2_ep2_etp2=TP2 | EP2 | ETP2,
        ep2_whole=EP2 | WHOLE,
        cp2_vpp2_ep2=CP2 | VPP2 | EP2,
    ),
    "moe_ep2": way(Case("moe", EP2, layers=4, updated=True), dp=DP, dp_whole=DP | WHOLE, tp2=TP2, pp2_ep2=PP2 | EP2),
    "moe_tp2_ep2_etp2": way(
        Case("moe", TP2 | EP2 | ETP2, layers=4, updated=True), dp=DP, vpp2_ep2=VPP2 | EP2, tp2_pp2=TP2 | PP2
    ),
    "moe_ep2_whole": way(Case("moe", EP2, layers=4, updated=True, distributed=False), dp=DP, ep2=EP2),
    "moe_cp2_vpp2_ep2": way(Case("moe", CP2 | VPP2 | EP2, layers=4, updated=True), dp=DP, tp2=TP2 | EP2 | ETP2),
}


def state(trainer: Any) -> dict[str, torch.Tensor]:
    """Whole moments (and masters) by key, put together from what every rank holds; copies must agree."""
    described = describe({str(i): unwrap(chunk).sharded_state_dict() for i, chunk in enumerate(trainer.chunks)})
    mine = []
    for one in held(trainer.optimizer):
        places = places_of_range(described[id(one.parameter)], one.parameter.shape, one.start, one.stop)
        for name, tensor in one.tensors.items():
            if name != MASTER or one.has_master:
                pieces = tensor.clone().split([place.numel for place in places])
                mine += [(name, place, piece) for place, piece in zip(places, pieces, strict=True)]
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, mine)
    found: dict[str, torch.Tensor] = {}
    for name, place, piece in (entry for part in everywhere for entry in part):
        tensor = found.setdefault(f"{name} {place.key}", torch.full(place.whole, float("nan")))
        box = tuple(slice(first, first + size) for first, size in zip(place.offset, place.shape, strict=True))
        before = tensor[box]
        torch.testing.assert_close(
            torch.where(before.isnan(), piece.reshape(place.shape), before), piece.reshape(place.shape)
        )
        tensor[box] = piece.reshape(place.shape)
    assert not any(tensor.isnan().any() for tensor in found.values())
    return found


def run(name: str, folder: Path, pairs: list[str]) -> dict[str, dict[str, float]]:
    """Of each reader: weights and moments that came back otherwise, the step count, how far the next update differs."""
    case, readers = WAYS[name]
    parallel, trainer, plan = build(case)
    trainer.step(plan, lr_step=1)
    store = CheckpointStore(folder / name, 1, parallel.control_group)
    store.save(1, trainer.chunks, trainer.optimizer, "{}", in_background=True)
    complete_weights(trainer.chunks)
    saved, moments = whole(trainer.chunks, "data"), state(trainer)
    trainer.step(plan, lr_step=2)
    while store.settle(wait=False) is None:
        pass
    complete_weights(trainer.chunks)
    wanted = whole(trainer.chunks, "data")
    shutdown()
    found = {}
    for reader, other in readers.items():
        if pairs and f"{name} to {reader}" not in pairs:
            continue
        parallel, trainer, plan = build(other)
        CheckpointStore(folder / name, 1, parallel.control_group).load(1, trainer.chunks, trainer.optimizer)
        loaded, again, steps = whole(trainer.chunks, "data"), state(trainer), step_of(trainer.optimizer)
        assert again.keys() == moments.keys(), again.keys() ^ moments.keys()
        trainer.step(plan, lr_step=2)
        complete_weights(trainer.chunks)
        after = whole(trainer.chunks, "data")
        shutdown()
        changes = {key: (after[key] - value, value - saved[key]) for key, value in wanted.items()}
        found[f"{name} to {reader}"] = {
            "weights": float(sum(not torch.equal(loaded[key], value) for key, value in saved.items())),
            "moments": float(sum(not torch.equal(again[key], value) for key, value in moments.items())),
            "step": float(steps),
            "change": sum(float(off.float().norm()) ** 2 for off, _ in changes.values()) ** 0.5
            / sum(float(change.float().norm()) ** 2 for _, change in changes.values()) ** 0.5,
        }
    return found


def main(folder: Path, pairs: list[str]) -> None:
    torch.set_num_threads(1)
    report: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(pair.partition(" to ")[0] for pair in pairs or WAYS):
        report |= run(name, folder, pairs)
    if os.environ["RANK"] == "0":
        (folder / "report.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
