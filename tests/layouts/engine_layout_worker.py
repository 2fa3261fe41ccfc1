"""The real Transformer Engine's layers under layouts of two ranks, beside local layers in one process.

torchrun --nproc-per-node 2 engine_layout_worker.py OUT.json --real

What it compiles is plain torch (tests/fake_engine_kernels.py). Cases and what is written of each are gradient_worker.py's. Context
parallelism is not among them: it needs more of what its attention compiles.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import te_worker as worker  # isort: skip  # with --real; before the platform, which would hide the engine

import gradients
import torch
from gradient_worker import TWO
from gradients import alone, compare, outcome, reference_of

from megatron_pz.train.parallel import shutdown

NAMES = (
    "dp2", "tp2", "tp2 sp", "pp2", "untied pp2", "vpp2, one bin", "moe tp2 sp", "moe pp2", "moe ep2", "moe tp2 sp ep2",
    "moe tp2 sp ep2, replayed", "dp2, updated, overlapped", "moe ep2, updated",
)  # fmt: skip


def main(out):
    torch.set_num_threads(1)
    # Triton's interpreter takes its time: one case has Transformer Engine's own permutation.
    unfused = {"moe_permute_fusion": False}
    cases = {name: TWO[name] if name == "moe ep2" else replace(TWO[name], transformer=unfused) for name in NAMES}
    wanted = {str(reference_of(case)): reference_of(case) for case in cases.values()}
    is_first = os.environ["RANK"] == "0"
    references = alone(wanted) if is_first else {}
    gradients.PLATFORM = worker.Engine()
    report = {}
    for name, case in cases.items():
        result = outcome(case)
        if result is not None:
            report[name] = compare(result, references[str(reference_of(case))])
    if is_first:
        out.write_text(json.dumps(report, indent=1), encoding="utf-8")
    shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
