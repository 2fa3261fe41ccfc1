"""Bytes that each rank holds in each case of `allocation_cases`: torchrun ... allocation_worker.py OF_TWO|OF_FOUR REPORT.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import allocation_cases
import torch
import torch.distributed as dist
from allocated import held

from megatron_pz.train.parallel import shutdown


def main() -> None:
    torch.set_num_threads(1)
    found = {}
    for name, case in getattr(allocation_cases, sys.argv[1]).items():
        mine = held(case["model"], allocation_cases.config_of(case))
        everywhere: list[dict] = [{}] * dist.get_world_size()
        dist.all_gather_object(everywhere, mine)
        found[name] = everywhere
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(found))
    shutdown()


if __name__ == "__main__":
    main()
