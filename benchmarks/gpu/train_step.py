"""A training step of Qwen3-4B- and 30B-A3B-shaped models: tokens a second, share of the card's measured GEMM rate, peak memory.

As many layers as fit (a layer's share of the work is what it is in the whole model; the head's is larger, so that MFU is that of
the shape that ran). bfloat16, FP8 where Transformer Engine is; packed rows beside rows padded to the longest; plain
`transformers` with the same layers for the step.

Usage: train_step.py [--out DIR] [--smoke] [--layers N] [--model dense|moe]
"""

from __future__ import annotations

import gc
import json
import random
import statistics
from typing import Any, cast

import torch
from common import ROOT, Record, arguments, device, gemm_flops, machine, seconds

SHAPES = {"dense": "Qwen3-4B-Base", "moe": "Qwen3-30B-A3B-Base"}
AIMS = {"dense": 0.50, "moe": 0.35}
FP8_AIM = 1.2
TOKENS = {"dense": 8192, "moe": 16384}  # of a micro-batch; an expert of 128 sees few
SHARE = {"dense": 0.45, "moe": 0.6}
"""Of the card's memory for weights, gradients and Adam. By the planner 8192 tokens of a dense layer take half as much again."""
NUM_ROWS, REPEATS = 2, 5
TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "vocab_size": 512, "moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip


def hf_config(model: str, layers: int, smoke: bool) -> dict[str, Any]:
    """config.json of the shape, with fewer layers."""
    found = json.loads((ROOT / "examples/models" / SHAPES[model] / "config.json").read_text(encoding="utf-8"))
    if smoke:
        found |= {name: value for name, value in TINY.items() if name in found}
    return found | {"num_hidden_layers": layers}


def layers_that_fit(model: str, smoke: bool, budget_bytes: float) -> int:
    """Of weights, gradients and Adam (18 bytes a parameter), leaving the rest for activations."""
    shape = hf_config(model, 1, smoke)
    hidden, head = shape["hidden_size"], shape["head_dim"]
    attention = hidden * head * 2 * (shape["num_attention_heads"] + shape["num_key_value_heads"])
    wide = shape["num_experts"] * shape["moe_intermediate_size"] if model == "moe" else shape["intermediate_size"]
    embedding = shape["vocab_size"] * hidden * (1 if shape.get("tie_word_embeddings") else 2)
    most = json.loads((ROOT / "examples/models" / SHAPES[model] / "config.json").read_text())["num_hidden_layers"]
    return max(1, min(most, int((budget_bytes / 18 - embedding) / (attention + 3 * hidden * wide))))


def lengths(total: int, smoke: bool) -> list[int]:
    """Of sequences as a round has them: prompts of some hundred tokens, answers from short to long."""
    rng = random.Random(0)
    found: list[int] = []
    while sum(found) < total:
        found.append(rng.randint(4, 24) if smoke else min(4096, 200 + int(rng.lognormvariate(5.5, 1.0))))
    return found


def samples(sizes: list[int], vocab_size: int) -> list[Any]:
    """Random tokens; the second half of each is trained."""
    from megatron_pz.types import Role, Sample

    rng, found = random.Random(1), []
    for index, size in enumerate(sizes):
        ids = tuple(rng.randrange(vocab_size) for _ in range(size))
        mask = tuple(float(at >= size // 2) for at in range(size))
        log_probs = tuple(-10.0 * weight for weight in mask)
        found.append(Sample(ids, mask, log_probs, rng.choice([-1.0, 1.0]), Role.PREDICTOR, f"1.0.{index}"))
    return found


def ours(
    model: str, layers: int, precision: str, impl: str | None, smoke: bool, on: torch.device, pads: bool = False
) -> dict[str, Any]:
    """Seconds of an update by the package's own trainer, and peak bytes by phase; `pads`: also of rows as long as the longest."""
    from megatron_pz.platform.select import select_platform

    platform = select_platform()
    from megatron_pz.batch.schedule import plan_update
    from megatron_pz.config.schema import Config, ModelConfig, TrainConfig
    from megatron_pz.models import random_init
    from megatron_pz.models.flops import forward_flops
    from megatron_pz.train import step as step_module
    from megatron_pz.train.deal import divisors
    from megatron_pz.train.model import build_model
    from megatron_pz.train.parallel import init_parallel, shutdown
    from megatron_pz.train.step import Trainer

    hf, tokens = hf_config(model, layers, smoke), 256 if smoke else TOKENS[model]
    config = Config(
        model=ModelConfig(init="random", params_dtype="bfloat16", fp8="off" if precision == "bf16" else "blockwise"),
        train=TrainConfig(
            max_tokens_per_micro_batch=tokens, lr=1e-6, lr_decay_style="constant", log_prob_kernel="auto"
        ),
        transformer={"transformer_impl": impl} if impl else {},
    )
    # The package draws on the CPU, the same for every layout: the better part of a minute for billions of weights.
    random_init.random_tensor = lambda name, shape, std, seed: (
        torch.ones(shape, device=on) if len(shape) == 1 else std * torch.randn(shape, device=on)
    )
    peaks: dict[str, int] = {}
    real = step_module.run_schedule

    def schedule(*given: Any, **named: Any) -> Any:
        platform.begin_phase()
        result = real(*given, **named)
        peaks["forward and backward"] = platform.memory_bytes()["peak"]
        platform.begin_phase()
        return result

    step_module.run_schedule = schedule
    parallel = init_parallel(config.parallel, platform, 1)
    try:
        trainer = Trainer(build_model(hf, config, platform, parallel), config, platform, parallel)
        sizes = lengths(NUM_ROWS * tokens, smoke)
        plan = plan_update(samples(sizes, hf["vocab_size"]), max_tokens=tokens, **cast(Any, divisors(config)))
        step = iter(range(1, 100))
        run = lambda: trainer.step(plan, lr_step=next(step))  # noqa: E731
        seconds(run, 2, on)  # kernels are chosen and compiled
        took = statistics.median(seconds(run, REPEATS, on))
        peaks |= {"optimizer": platform.memory_bytes()["peak"], "held": platform.memory_bytes()["allocated"]}
        step_module.run_schedule = real
        first, second = forward_flops(hf)
        work = 3 * sum(first * n + second * n * n for n in sizes)
        packed_tokens, longest = sum(batch.num_tokens for batch in plan.micro_batches[0]), max(sizes)

        def padded() -> dict[str, Any]:
            nonlocal plan
            rows = samples([longest] * len(sizes), hf["vocab_size"])
            plan = plan_update(rows, max_tokens=max(tokens, longest), **cast(Any, divisors(config)))
            # The first run meets new shapes.
            return {"fewer": longest * len(sizes) / packed_tokens, "faster": seconds(run, 2, on)[-1] / took}

        padding = {"padding": attempt(padded)} if pads else {}
        return padding | {
            "seconds": took,
            "tokens": sum(sizes),
            "tokens_per_s": sum(sizes) / took,
            "flops_per_s": work / took,
            "peak_bytes": max(peaks["forward and backward"], peaks["optimizer"]),
            "peak_bytes_by_phase": peaks,
        }
    finally:
        step_module.run_schedule = real
        shutdown()


def plain(model: str, layers: int, smoke: bool, on: torch.device) -> dict[str, Any]:
    """The same shape in `transformers`: cross-entropy over padded rows, Adam of torch, float32 masters by autocast."""
    import transformers

    hf, tokens = hf_config(model, layers, smoke), 256 if smoke else TOKENS[model]
    kind = transformers.AutoConfig.for_model(hf["model_type"])
    config = type(kind)(**{name: value for name, value in hf.items() if name not in ("architectures", "model_type")})
    with on:  # its weights are drawn there
        built = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    optimizer = torch.optim.AdamW(built.parameters(), lr=1e-6, fused=on.type == "cuda")
    sizes = sorted(lengths(NUM_ROWS * tokens, smoke))
    rows: list[list[int]] = []
    for size in sizes:  # neighbours in length share a padded batch of at most `tokens`
        if rows and (len(rows[-1]) + 1) * size <= tokens:
            rows[-1].append(size)
        else:
            rows.append([size])

    def step() -> None:
        for row in rows:
            ids = torch.randint(0, hf["vocab_size"], (len(row), max(row)), device=on)
            keep = torch.arange(max(row), device=on)[None] < torch.tensor(row, device=on)[:, None]
            with torch.autocast(on.type, torch.bfloat16):
                built(input_ids=ids, attention_mask=keep.long(), labels=ids.masked_fill(~keep, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds(step, 1, on)
    took = statistics.median(seconds(step, 3, on))
    peak = torch.cuda.max_memory_allocated() if on.type == "cuda" else 0
    return {"seconds": took, "tokens": sum(sizes), "tokens_per_s": sum(sizes) / took, "peak_bytes": peak}


def attempt(run: Any, *given: Any) -> dict[str, Any]:
    """What `run` finds, or why it could not; memory is free afterwards."""
    try:
        return dict(run(*given))
    except (Exception, SystemExit) as error:  # noqa: BLE001  # a part that cannot run is told, and does not end the rest
        return {"reason": f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def row(what: str, found: dict[str, Any], ceiling: float, aim: float | None) -> dict[str, Any]:
    """A line of the table."""
    if "reason" in found:
        return {"what": what, "reason": found["reason"]} | ({"aim": f"MFU >= {aim:.0%}"} if aim else {})
    text = f"{found['tokens_per_s']:.0f} tokens/s, peak {found['peak_bytes'] / 2**30:.1f} GiB"
    if phases := found.get("peak_bytes_by_phase"):
        text += " (" + ", ".join(f"{phase} {size / 2**30:.1f}" for phase, size in phases.items()) + ")"
    line = {"what": what, **found}
    if "flops_per_s" in found:
        share = found["flops_per_s"] / ceiling
        text += f", MFU {share:.1%} of {ceiling / 1e12:.1f} TFLOP/s"
        line |= {"mfu": share} | ({"aim": f"MFU >= {aim:.0%}", "met": share >= aim} if aim else {})
    return line | {"measured": text}


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--model", choices=list(SHAPES))
    given = parser.parse_args()
    on = device(given.smoke)
    memory = torch.cuda.get_device_properties(on).total_memory if on.type == "cuda" else 0
    ceiling = gemm_flops(on)
    part = "train_step" + (f"_{given.model}" if given.model else "")
    record = Record(given.out, part, machine(on) | {"gemm_flops_per_s": ceiling})
    # What the aims are about comes first: the time of a part is limited.
    ways: list[tuple[str, str | None]] = [
        ("bf16", None),
        ("fp8", None),
        *([("bf16", "local")] if on.type == "cuda" else []),
    ]
    for model in [given.model] if given.model else SHAPES:
        layers = given.layers or (2 if given.smoke else layers_that_fit(model, False, SHARE[model] * memory))
        size, packed = f"{SHAPES[model]} shape, {layers} layers", False
        by_precision: dict[str, dict[str, Any]] = {}
        for precision, impl in ways:
            found = attempt(ours, model, layers, precision, impl, given.smoke, on, not packed)
            label = {None: "Transformer Engine" if on.type == "cuda" else "local", "local": "local layers"}[impl]
            aim = AIMS[model] if precision == "bf16" else None
            record.add(row(f"{size}: {precision}, {label}", found, ceiling, aim))
            by_precision.setdefault(precision, found)
            if padding := found.pop("padding", None):
                packed, line = True, {"what": f"{size}: packing beside padding", **padding}
                if "fewer" in padding:
                    line["measured"] = (
                        f"{padding['fewer']:.2f} times fewer tokens, {padding['faster']:.2f} times faster"
                    )
                record.add(line)
        if model == "dense" and all("seconds" in found for found in by_precision.values()):
            gain = by_precision["bf16"]["seconds"] / by_precision["fp8"]["seconds"]
            record.add(
                {
                    "what": f"{size}: FP8 over bf16",
                    "measured": f"{gain:.2f}",
                    "aim": f">= {FP8_AIM}",
                    "met": gain >= FP8_AIM,
                }
            )
        found = attempt(plain, model, layers, given.smoke, on)
        record.add(row(f"{size}: transformers, padded", found, ceiling, None))
    record.finish()


if __name__ == "__main__":
    main()
