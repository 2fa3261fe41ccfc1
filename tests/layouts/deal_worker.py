"""A rank of four, two of them to a data-parallel rank: is dealt an update by rank 0, and says what came.

Usage: torchrun ... deal_worker.py OUT
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_pz.platform.select import select_platform

select_platform("cpu")  # before Megatron is imported

from builders import sample  # noqa: E402

from megatron_pz.batch.schedule import hands  # noqa: E402
from megatron_pz.train.deal import scatter  # noqa: E402

SAMPLES = [
    sample(range(10000 * i, 10000 * i + length), (7,))
    for i, length in enumerate((900, 500, 2900, 1200, 700, 2100, 300, 1800))
]
MAX_TOKENS = 3200


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    received = [0]
    plain_scatter = dist.scatter

    def counting(tensor, *rest, **named):  # what this rank is sent
        received[0] += tensor.numel()
        return plain_scatter(tensor, *rest, **named)

    dist.scatter = counting
    parallel = SimpleNamespace(world_size=4, dp_rank_of=(0, 1, 0, 1), control_group=dist.group.WORLD)
    found = {}
    for name, samples in (("update", SAMPLES), ("nothing", [])):
        dealt = None
        if rank == 0:
            by_rank = hands(samples, max_tokens=MAX_TOKENS, dp_size=2)
            dealt = [[hand] for hand in by_rank] if samples else [[], []]
        mine = scatter(dealt, parallel)
        found[name] = [
            {"dp_rank": hand.dp_rank, "samples": {i: one.token_ids.tolist() for i, one in hand.samples.items()}}
            for hand in mine
        ]
    Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(found | {"bytes": received[0]}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
