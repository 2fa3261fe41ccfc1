"""How full micro-batches are and how evenly ranks are loaded, on lengths as in a run, and how long planning takes.

Lengths are log-normal, 200 to 5600 tokens at two deviations from the median and cut off there (mean 1400); 288 prompts with
8 responses are 2304 samples. Work is that of Qwen3-30B-A3B: products with 3.0e9 weights and attention in 48 layers.

Waste is the part of the token budget of all micro-batches that nothing stands in; beside it what no packing can be below,
because every rank has the same whole number of micro-batches: seven of 64 ranks cannot hold what fills 6.2. Work is then shared
out evenly, so that no micro-batch is as long as the budget: waste of the fullest counts from the longest that there is, which
is what memory is needed for. Imbalance is the most work of a rank over the mean. Waiting
is the same where all ranks wait for each other in every micro-batch, as experts make them. Seconds are of the process.

Usage: packing.py [--seeds 3] [--out benchmarks/records/packing]
"""

from __future__ import annotations

import argparse
import pickle
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import records

from megatron_pz.batch.balance import Cost, balance, least, share_out
from megatron_pz.batch.hand import Hand
from megatron_pz.batch.schedule import hands
from megatron_pz.types import Role, Sample

ROOT = Path(__file__).resolve().parents[2]
COST = Cost(6.08e9, 3.93e5)
"""`models.flops.forward_flops` of Qwen3-30B-A3B."""
DP_SIZES = (1, 2, 4, 8, 16, 32, 64)
BUDGETS = (8192, 16384, 32768)
T = TypeVar("T")


def drawn(count: int, seed: int) -> list[int]:
    """Lengths of `count` samples."""
    low, high = np.log(200), np.log(5600)
    logs = np.random.default_rng(seed).normal((low + high) / 2, (high - low) / 4, count)
    return [int(length) for length in np.exp(logs.clip(low, high)).round()]


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """Its result and its CPU-seconds."""
    start = time.process_time()
    return call(), time.process_time() - start


def measure(count: int, max_tokens: int, dp_size: int, seed: int) -> dict[str, float]:
    """One plan."""
    lengths = drawn(count, seed)
    ranks, seconds = timed(lambda: share_out(lengths, max_tokens=max_tokens, dp_size=dp_size, cost=COST))
    found = balance(ranks, lengths, max_tokens, COST)
    fewest, least_waste, least_imbalance = least(lengths, max_tokens, dp_size, COST)
    fullest = max(sum(lengths[index] for index in indices) for bins in ranks for indices in bins)
    return {
        "micro_batches": len(ranks[0]),
        "fullest": fullest,
        "waste_of_fullest": 1 - sum(lengths) / (len(ranks[0]) * dp_size * fullest),
        "least_micro_batches": fewest,
        "waste": found.waste,
        "least_waste": least_waste,
        "imbalance": found.imbalance,
        "least_imbalance": least_imbalance,
        "waiting": found.waiting,
        "worst_row": found.worst_row,
        "seconds": seconds,
    }


def whole_plan(count: int, dp_size: int, max_tokens: int) -> dict[str, float]:
    """Everything that rank 0 does for an update, and one rank's part of it: tokens and log-probs are drawn."""
    rng = np.random.default_rng(0)
    samples = [_sample(rng, length) for length in drawn(count, 0)]
    dealt: list[Hand]
    dealt, hands_s = timed(lambda: hands(samples, max_tokens=max_tokens, dp_size=dp_size, cost=COST))
    tokens = [sum(len(one.token_ids) for one in hand.samples.values()) for hand in dealt]
    packed, pack_s = timed(lambda: pickle.dumps(dealt[0], pickle.HIGHEST_PROTOCOL))
    batches, rank_s = timed(lambda: dealt[0].micro_batches())
    made = sum(array.nbytes for batch in batches for array in _arrays(batch))
    return {
        "tokens": sum(tokens),
        "hands_s": hands_s,
        "pickle_s": pack_s * dp_size,
        "micro_batches_of_a_rank_s": rank_s,
        "bytes_a_token_sent": len(packed) / tokens[0],
        "bytes_a_token_of_micro_batches": made / tokens[0],
    }


def _arrays(batch: Any) -> list[np.ndarray]:
    return [value for name in batch.__slots__ if isinstance(value := getattr(batch, name), np.ndarray)]


def _sample(rng: np.random.Generator, length: int) -> Sample:
    prompt = min(500, length // 2)
    trained = length - prompt
    return Sample(
        token_ids=tuple(rng.integers(0, 150_000, length).tolist()),
        loss_weights=(0.0,) * prompt + (1.0,) * trained,
        rollout_log_probs=(0.0,) * prompt + tuple((-rng.random(trained)).tolist()),
        advantage=1.0,
        role=Role.PREDICTOR,
        group_id="0",
    )


def row(name: str, found: Sequence[dict[str, float]]) -> str:
    """Of the table: means, and the largest of what is to be small."""
    mean = {key: statistics.fmean(one[key] for one in found) for key in found[0]}
    most = {key: max(one[key] for one in found) for key in found[0]}
    return (
        f"| {name} | {mean['micro_batches']:.0f} ({mean['least_micro_batches']:.0f}) | "
        f"{mean['waste']:.2%} ({mean['least_waste']:.2%}) | {mean['waste_of_fullest']:.2%} | "
        f"{most['imbalance']:.2%} ({most['least_imbalance']:.2%}) | {most['waiting']:.2%} | "
        f"{most['worst_row']:.1%} | {most['seconds']:.2f} |\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/records/packing")
    arguments = parser.parse_args()
    plans: dict[str, list[dict[str, float]]] = {}
    for max_tokens in BUDGETS:
        for dp_size in DP_SIZES:
            found = [measure(2304, max_tokens, dp_size, seed) for seed in range(arguments.seeds)]
            plans[f"2304 samples, {max_tokens} tokens, {dp_size} ranks"] = found
    for max_tokens, dp_size in ((8192, 1), (8192, 64), (8192, 512), (32768, 64)):
        plans[f"100 000 samples, {max_tokens} tokens, {dp_size} ranks"] = [measure(100_000, max_tokens, dp_size, 0)]
    for count, dp_size in ((128, 64), (64, 64), (40, 64)):
        plans[f"{count} samples, 8192 tokens, {dp_size} ranks"] = [measure(count, 8192, dp_size, 0)]
    whole = {"2304 samples": whole_plan(2304, 16, 16384), "20 000 samples": whole_plan(20_000, 64, 16384)}
    record = {
        **records.here(),
        "seeds": arguments.seeds,
        "cost": [COST.token, COST.pair],
        "plans": plans,
        "whole": whole,
    }
    table = (
        "| samples, budget, data-parallel ranks | micro-batches a rank (least) | waste (least) | of the fullest | "
        "imbalance (least) | waiting | worst single micro-batch | CPU-s |\n|---|---|---|---|---|---|---|---|\n"
    ) + "".join(row(name, found) for name, found in plans.items())
    told = "".join(
        f"- {name}, {one['tokens'] / 1e6:.1f} M tokens: rank 0 plans and makes what it sends in {one['hands_s']:.2f} CPU-s "
        f"and packs it in {one['pickle_s']:.2f}; a rank makes its micro-batches in "
        f"{one['micro_batches_of_a_rank_s']:.3f} s. {one['bytes_a_token_sent']:.1f} bytes a token are sent to a rank, for its "
        f"own samples only; as micro-batches they would be {one['bytes_a_token_of_micro_batches']:.1f}.\n"
        for name, one in whole.items()
    )
    text = (
        "# Packing: waste, balance, time\n\n"
        f"{record['date']}, {record['cpu']}. Log-normal lengths of 200 to 5600 tokens, work of Qwen3-30B-A3B. Means over "
        f"{arguments.seeds} draws (100 000 and few samples: one), of the last four the largest.\n"
        "In brackets: what no packing of these lengths can be below. Waste is of the budget; of the fullest: of the longest "
        "micro-batch that there is, which memory is needed for. Waiting: most over mean work in each micro-batch, over the "
        "update. Worst: of a single micro-batch; it weighs one in that many.\n\n"
        f"{table}\n## Everything that is done for an update\n\n{told}"
    )
    records.write(arguments.out, record, text)
    print("\n" + text)


if __name__ == "__main__":
    main()
