"""The real Transformer Engine's layers under layouts of two ranks, beside local layers in one process.

torchrun --nproc-per-node 2 engine_layout_worker.py OUT.json --real

What it compiles is plain torch (tests/fake_engine_kernels.py). Cases and what is written of each are gradient_worker.py's. Of context
parallelism there is `score` alone, in bfloat16: its attention takes no float32 there, and its backward never ends over gloo.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import te_worker as worker  # isort: skip  # with --real; before the platform, which would hide the engine

import gradients
import numpy as np
import torch
from gradient_worker import TWO
from gradients import alone, build, compare, outcome, reference_of, samples

from megatron_pz.train.parallel import shutdown

NAMES = (
    "dp2", "tp2", "tp2 sp", "pp2", "untied pp2", "vpp2, one bin", "moe tp2 sp", "moe pp2", "moe ep2", "moe tp2 sp ep2",
    "moe tp2 sp ep2, replayed", "dp2, updated, overlapped", "moe ep2, updated",
)  # fmt: skip
OF_CONTEXT = ("cp2", "nope cp2", "moe cp2 ep2, replayed")


def scores(case):
    """The log-probs of each sequence on this rank, all ranks' the same under context parallelism."""
    parallel, trainer, plan = build(case)
    mine, lengths = plan.micro_batches[parallel.dp_rank], [len(sample.token_ids) for sample in samples()]
    found = {}
    for batch, values in zip(mine, trainer.score(mine), strict=True):
        bounds = zip(batch.cu_seqlens, batch.cu_seqlens[1:], batch.sample_indices, strict=False)
        found |= {index: values[start:end][: lengths[index]] for start, end, index in bounds if index >= 0}
    shutdown()
    return found


def main(out):
    torch.set_num_threads(1)
    # Triton's interpreter takes its time: one case has Transformer Engine's own permutation.
    unfused = {"moe_permute_fusion": False}
    cases = {name: TWO[name] if name == "moe ep2" else replace(TWO[name], transformer=unfused) for name in NAMES}
    halves = {name: replace(TWO[name], dtype="bfloat16", transformer=unfused) for name in OF_CONTEXT}
    wanted = {str(reference_of(case)): reference_of(case) for case in (*cases.values(), *halves.values())}
    is_first = os.environ["RANK"] == "0"
    references = alone(wanted) if is_first else {}
    gradients.PLATFORM = worker.Engine()
    report = {}
    for name, case in halves.items():
        found = scores(case)
        right = references[str(reference_of(case))]["scores"] if is_first else found
        report[name] = {"score": max(float(np.abs(found[index] - values).max()) for index, values in right.items())}
    for name, case in cases.items():
        result = outcome(case)
        if result is not None:
            report[name] = compare(result, references[str(reference_of(case))])
    if is_first:
        out.write_text(json.dumps(report, indent=1), encoding="utf-8")
    shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
