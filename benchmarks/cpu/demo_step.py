"""Where a step of `make demo` spends its CPU-seconds, phase by phase, beside the floor that its arithmetic sets.

The program itself runs, with the demo's settings, in a folder of its own; clocks are hung around its parts. The floor of
a phase is its floating-point operations (weights, attention, output layer) at the rate at which this machine multiplies
matrices of these shapes, measured in the same process before and after. The first step warms up and is left out.

Usage: demo_step.py [--steps 8] [--out benchmarks/records/demo_step] [any setting of the program]
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import records
import torch
from gemm import Shape, gemm_rate

torch.set_num_threads(1)

from megatron_pz.platform.select import select_platform  # noqa: E402

select_platform("cpu")

from megatron_pz.config.load import load_config  # noqa: E402
from megatron_pz.engine.embedded import batch as embedded_batch  # noqa: E402
from megatron_pz.engine.embedded.cache import PrefillPlan  # noqa: E402
from megatron_pz.engine.embedded.engine import EmbeddedEngine  # noqa: E402
from megatron_pz.models.folder import read_hf_config, resolve_folder  # noqa: E402
from megatron_pz.report.timers import Timers  # noqa: E402
from megatron_pz.train import launch  # noqa: E402
from megatron_pz.train import step as train_step  # noqa: E402
from megatron_pz.train.decode import PolicyDecoder  # noqa: E402
from megatron_pz.train.journal import RunJournal  # noqa: E402
from megatron_pz.train.play import GamePlayer  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
PHASES = {
    "prefill": "prompts through the model",
    "decode": "responses, token by token",
    "sample": "softmax and draw",
    "engine": "batching of requests",
    "game": "prompts, parsing, rewards, advantages",
    "pack": "samples to micro-batches",
    "score": "old log-probs (the demo takes the engine's)",
    "train": "forward and backward",
    "optimizer": "clip, Adam, metrics",
    "sync": "weights to the engine",
    "journal": "metrics, rollouts, console",
    "other": "the loop",
}
timers = Timers(time.process_time)
steps: list[dict[str, float]] = []
work: dict[str, float] = {}


def timed(owner: Any, name: str, phase: str | Callable[..., str], then: Callable[..., None] | None = None) -> None:
    """Count the CPU-seconds of `owner.name` for `phase`, less those of timed parts inside it."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def around(*args: Any, **kwargs: Any) -> Any:
        with timers(phase if isinstance(phase, str) else phase(*args)):
            result = original(*args, **kwargs)
        if then:
            then(result, *args)
        return result

    setattr(owner, name, around)


def count_play(round_: Any, *args: Any) -> None:
    """Tokens and attention pairs of a round."""
    completions = [rollout.completion for group in round_.groups for rollout in group.rollouts]
    prompts = {completion.prompt_ids for completion in completions}
    work["prompts"] = len(prompts)
    work["responses"] = len(completions)
    work["prefill_pairs"] = sum(len(prompt) ** 2 / 2 for prompt in prompts)
    # The first response token comes from the prompt's logits; the last is not fed back.
    work["decoded_tokens"] = sum(len(completion.token_ids) - 1 for completion in completions)
    work["decode_pairs"] = sum(
        len(c.prompt_ids) * (len(c.token_ids) - 1) + len(c.token_ids) ** 2 / 2 for c in completions
    )
    work["trained_pairs"] = sum(len(sample.token_ids) ** 2 / 2 for sample in round_.samples)


def count_prefill(logits: Any, model: Any, cache: Any, ids: Any, *args: Any) -> None:
    """New prompt tokens of a forward (a prompt that begins like another takes its keys over), or a decode step."""
    if isinstance(cache.plan, PrefillPlan):
        work["prefilled_tokens"] = work.get("prefilled_tokens", 0) + ids.shape[0]
    else:
        work["decode_steps"] = work.get("decode_steps", 0) + 1


def count_update(result: Any, *args: Any) -> None:
    """Tokens of the update."""
    work["packed_tokens"] = result.metrics.get("tokens/packed", 0)
    work["trained_tokens"] = result.metrics.get("tokens/trained", 0)


def end_step(_: Any, journal: Any, step: int, *args: Any) -> None:
    """Close the step's clocks."""
    found = {name.removeprefix("time/").removesuffix("_s"): spent for name, spent in timers.lap().items()}
    total = found.pop("step")
    steps.append(
        {**found, "other": total - sum(found.values()), "total": total, **{f"n_{k}": v for k, v in work.items()}}
    )
    work.clear()


def hang_clocks() -> None:
    """Around every part of a step."""
    timed(PolicyDecoder, "logits", lambda _, cache, *a: _phase_of(cache), count_prefill)
    timed(embedded_batch, "sample", "sample")
    timed(EmbeddedEngine, "_round", "engine")
    timed(EmbeddedEngine, "load", "sync")
    timed(GamePlayer, "play", "game", count_play)
    timed(launch, "deal", "pack")
    timed(train_step, "run_schedule", "train")
    timed(train_step.Trainer, "score", "score")
    timed(train_step.Trainer, "step", "optimizer", count_update)
    timed(RunJournal, "write", "journal", end_step)


def _phase_of(cache: Any) -> str:
    return "prefill" if isinstance(cache.plan, PrefillPlan) else "decode"


def floors(shape: Shape, step: dict[str, float], rates: dict[str, float]) -> dict[str, float]:
    """Seconds that the arithmetic of a step's phases takes at the machine's rates."""
    prefill = shape.body(step["n_prefilled_tokens"]) + shape.attention(step["n_prefill_pairs"])
    decode = shape.body(step["n_decoded_tokens"]) + shape.attention(step["n_decode_pairs"])
    train = shape.body(step["n_packed_tokens"]) + shape.attention(step["n_trained_pairs"])
    return {
        "prefill": (prefill + shape.head(step["n_prompts"])) / rates["forward"],
        "decode": (decode + shape.head(step["n_decoded_tokens"])) / rates["decode"],
        "train": 3 * (train + shape.head(step["n_trained_tokens"])) / rates["update"],
    }


def main() -> None:
    """Run, print the table, write the records."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=8, help="the first is not counted")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/records/demo_step")
    arguments, settings = parser.parse_known_args()
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        own = f"--run-dir {folder} --train-iters {arguments.steps} --eval-interval 0 --save-interval 0 --no-export-hf"
        config = load_config(["examples/demo.toml", *own.split(), "--no-write-page", *settings])
        shape = Shape.of(read_hf_config(resolve_folder(config.model.hf_model)))
        hang_clocks()
        timers.lap()
        rows = 256
        before = measured(shape, rows)
        launch.train(config)
        after = measured(shape, rows)
    rates = {name: max(before[name], after[name]) for name in before}
    kept = [step for step in steps[1:] if step.get("n_packed_tokens")]
    means = {key: statistics.fmean(step.get(key, 0.0) for step in kept) for key in {k for s in kept for k in s}}
    floor = floors(shape, means, rates)
    table = tabulated(means, floor)
    record = {
        **records.here(),
        "steps": kept,
        "means": means,
        "floor_s": floor,
        "gemm_flops_per_s": rates,
    }
    told = (
        f"{record['date']}, {record['cpu']}, one thread, {len(kept)} steps. Matrix products of these shapes: "
        f"{rates['update'] / 1e9:.0f} GFLOP/s in an update, {rates['decode'] / 1e9:.0f} with {rows} rows.\n\n"
        f"A step: {means['n_prompts']:.0f} prompts ({means['n_prefilled_tokens']:.0f} tokens after shared beginnings), "
        f"{means['n_responses']:.0f} responses ({means['n_decoded_tokens']:.0f} tokens fed, {means['n_decode_steps']:.0f} "
        f"decode steps), {means['n_packed_tokens']:.0f} packed tokens of which {means['n_trained_tokens']:.0f} trained."
    )
    text = f"# A step of the demo, phase by phase\n\n{told}\n\n{table}"
    records.write(arguments.out, record, text)
    print("\n" + text)


def measured(shape: Shape, rows: int) -> dict[str, float]:
    """Rates of matrix products, operations a second."""
    return {
        "forward": gemm_rate(shape, 4096, backward=False),
        "decode": gemm_rate(shape, rows, backward=False),
        "update": gemm_rate(shape, 4096, backward=True),
    }


def tabulated(means: dict[str, float], floor: dict[str, float]) -> str:
    """CPU-seconds, share and floor of each phase, in Markdown."""
    lines = ["| phase | CPU-seconds | share | floor | times the floor |", "|---|---|---|---|---|"]
    for phase, meaning in PHASES.items():
        spent = means.get(phase, 0.0)
        least = f"{floor[phase]:.3f} | {spent / floor[phase]:.1f}" if phase in floor else "- | -"
        lines.append(f"| {phase}: {meaning} | {spent:.3f} | {spent / means['total']:.0%} | {least} |")
    total = sum(floor.values())
    lines.append(f"| **step** | {means['total']:.3f} | 100% | {total:.3f} | {means['total'] / total:.1f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
