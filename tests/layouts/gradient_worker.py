"""Gradients, metrics and scores of several layouts against one process, all in one run of torchrun.

torchrun --nproc-per-node N gradient_worker.py two|four OUT.json

Each case takes down Megatron's groups and builds its own. Gradients are compared under Hugging Face's names, made whole
by the mappings of the name table. Rank 0 writes, for each case: `grad` (relative error over all parameters), `worst`
(of one parameter) and its name, `metrics` (largest relative difference of a metric), `score` (largest difference of a
log-prob), `weights` (relative, over all weights after the update). ONLY="cp2;tp2 sp" in the environment runs these alone.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gradients import PLATFORM, Case, alone, build, compare, outcome, reference_of, whole
from megatron.core import parallel_state

from megatron_pz.config.schema import ParallelConfig
from megatron_pz.errors import NumericsError
from megatron_pz.models.logprobs import token_log_probs
from megatron_pz.train.parallel import init_parallel, shutdown

TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
AUX = {"moe_aux_loss_coeff": 0.01}
Z = {"moe_z_loss_coeff": 0.01}
RECOMPUTED = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
EP2, SP = {"expert_model_parallel_size": 2}, {"sequence_parallel": True}
CP2, VPP2 = {"context_parallel_size": 2}, PP2 | {"virtual_pipeline_model_parallel_size": 2}
ETP2, OF_PAIRS = {"expert_tensor_parallel_size": 2}, {"align": 2}

ONE = {
    "one bin each": Case(max_tokens=1),
    "one bin for all": Case(max_tokens=10**6),
    "sequence mean, one bin each": Case(mean="sequence_mean", max_tokens=1),
    "moe, one bin each": Case("moe", max_tokens=1),
}
TWO = {
    "dp2": Case(),
    "dp2, sequence mean": Case(mean="sequence_mean", max_tokens=30),
    "dp2, one bin for all, overlapped": Case(max_tokens=10**6, ddp={"overlap_grad_reduce": True}),
    "dp2, old and reference scored": Case(rescored=True),
    "dp2, importance masked": Case(importance="masked"),
    "tp2": Case(layout=TP2),
    "tp2 sp": Case(layout=TP2 | SP),
    "pp2": Case(layout=PP2),
    "pp2, old and reference scored": Case(layout=PP2, rescored=True),
    "untied pp2": Case("untied", PP2),
    "moe dp2": Case("moe"),
    "moe tp2 sp": Case("moe", TP2 | SP),
    "moe pp2": Case("moe", PP2),
    "moe ep2": Case("moe", EP2),
    "moe ep2, one bin each": Case("moe", EP2, max_tokens=1),
    "moe tp2 sp ep2": Case("moe", TP2 | SP | EP2),
    # The auxiliary loss is a function of each micro-batch: the reference must have the same ones, padding included.
    "moe tp2 sp, auxiliary loss": Case("moe", TP2 | SP, packed_for=OF_PAIRS, transformer=AUX),
    "moe tp2 sp ep2, auxiliary loss": Case("moe", TP2 | SP | EP2, packed_for=OF_PAIRS, transformer=AUX),
    "moe tp2 sp, z loss": Case("moe", TP2 | SP, packed_for=OF_PAIRS, transformer=Z),
    "moe dp2, replayed": Case("moe", replayed=True),
    "moe tp2 sp ep2, replayed": Case("moe", TP2 | SP | EP2, replayed=True),
    "moe pp2, replayed and recomputed": Case("moe", PP2, replayed=True, transformer=RECOMPUTED),
    "cp2": Case(layout=CP2),
    "cp2, one bin each, old and reference scored": Case(layout=CP2, max_tokens=1, rescored=True),
    "nope cp2": Case("nope", CP2),
    "moe cp2 ep2, replayed": Case("moe", CP2 | EP2, replayed=True),
    "moe cp2, auxiliary loss": Case("moe", CP2, packed_for={"context_size": 2}, transformer=AUX),
    "moe cp2, z loss": Case("moe", CP2, packed_for={"context_size": 2}, transformer=Z),
    "vpp3": Case(layout=VPP2 | {"virtual_pipeline_model_parallel_size": 3}, layers=6, max_tokens=30),
    "vpp2, one bin": Case(layout=VPP2, layers=4, max_tokens=10**6),
    "moe vpp2, replayed and recomputed": Case("moe", VPP2, layers=4, replayed=True, transformer=RECOMPUTED),
    "dp2, updated": Case(updated=True),
    "dp2, updated, overlapped": Case(updated=True, ddp={"overlap_grad_reduce": True, "overlap_param_gather": True}),
    "moe ep2, updated": Case("moe", EP2, updated=True),
}
FOUR = {
    "tp2 pp2": Case(layout=TP2 | PP2),
    "tp2 sp pp2": Case(layout=TP2 | SP | PP2),
    "tp2 dp2": Case(layout=TP2),
    "moe tp2 sp pp2 ep2": Case("moe", TP2 | SP | PP2 | EP2),
    "cp4": Case(layout={"context_parallel_size": 4}),
    "pp4 vpp2": Case(layout=VPP2 | {"pipeline_model_parallel_size": 4}, layers=8, max_tokens=30),
    "tp2 sp cp2": Case(layout=TP2 | SP | CP2),
    "cp2 vpp2, old and reference scored": Case(layout=CP2 | VPP2, layers=4, rescored=True),
    "moe tp2 sp etp2 ep2": Case("moe", TP2 | SP | ETP2 | EP2),
    "cp2 dp2, updated": Case(layout=CP2, updated=True),
    "vpp2 dp2, updated, overlapped": Case(
        layout=VPP2, layers=4, updated=True, ddp={"overlap_grad_reduce": True, "overlap_param_gather": True}
    ),
    "moe dp4 ep2, updated": Case("moe", EP2, updated=True),
}


def vocabulary_parallel_error() -> dict[str, float]:
    """float64 log-probs, entropies and gradients over two shards, one of them partly or wholly padding, against one."""
    parallel = init_parallel(ParallelConfig(**TP2), PLATFORM, seed=1)
    group = parallel_state.get_tensor_model_parallel_group()
    errors = {}
    for vocab_size in (16, 11, 8, 5):
        torch.manual_seed(0)
        hidden, weight = torch.randn(7, 6, dtype=torch.float64), torch.randn(16, 6, dtype=torch.float64)
        labels = torch.randint(0, vocab_size, (7,))
        results = []
        for rows, ranks in ((weight, None), (weight.chunk(2)[parallel.tp_rank], group)):
            h, w = hidden.clone().requires_grad_(), rows.clone().requires_grad_()
            log_probs, entropy = token_log_probs(
                h, w, labels, temperature=0.7, vocab_size=vocab_size, chunk_tokens=3, tp_group=ranks
            )
            (log_probs * torch.arange(1.0, 8.0)).sum().backward()
            if ranks is not None:
                dist.all_reduce(h.grad, group=ranks)
            results.append((log_probs.detach(), entropy, h.grad, w.grad))
        one, two = results
        one = (*one[:3], one[3].chunk(2)[parallel.tp_rank])
        errors[f"vocab {vocab_size}"] = max((a - b).abs().max().item() for a, b in zip(one, two, strict=True))
    parallel_state.destroy_model_parallel()
    return errors


def refusal() -> dict[str, Any]:
    """What every rank says, and whether it keeps its weights and optimizer, when one rank meets a NaN."""
    _, trainer, plan = build(Case(updated=True, poisoned=True))
    before = whole(trainer.chunks, "data")
    try:
        trainer.step(plan, lr_step=1)
    except NumericsError as error:
        said = str(error)
    else:
        said = "nothing"
    is_kept = all(torch.equal(before[name], after) for name, after in whole(trainer.chunks, "data").items())
    heard: list[Any] = [None] * dist.get_world_size()
    parts = getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])
    counted = sum(float(state["step"]) for part in parts for state in part.optimizer.state.values())
    dist.all_gather_object(heard, (said, is_kept, counted))
    parallel_state.destroy_model_parallel()
    return {"heard": heard}


def main(which: str, out: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    cases = TWO if which == "two" else FOUR
    if only := os.environ.get("ONLY"):
        cases = {name: case for name, case in cases.items() if name in only.split(";")}
    references: dict[Case, Any] = {}
    report: dict[str, Any] = {}
    if rank == 0:
        own = ONE if which == "two" else {}
        wanted = {str(reference_of(case)): reference_of(case) for case in (*cases.values(), *own.values())}
        results = alone({**wanted, **own})
        references = {key: results[key] for key in wanted}
        report = {name: compare(results[name], references[str(reference_of(case))]) for name, case in own.items()}
    for name, case in cases.items():
        result = outcome(case)
        if result is not None:
            report[name] = compare(result, references[str(reference_of(case))])
    if which == "two":
        report["vocabulary parallel"] = vocabulary_parallel_error()
        report["refusal"] = refusal()
    if rank == 0:
        out.write_text(json.dumps(report, indent=1))
    shutdown()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
