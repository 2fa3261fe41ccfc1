"""Log-probs and entropies of the head: naive logits, chunks, the fused kernel, Liger's cross-entropy. Time and memory, in turns.

    python benchmarks/gpu/logprobs.py --out DIR [--smoke]

Forward and backward over 8192 tokens in bfloat16, on one GPU, for the shapes of three models. Liger's makes a summed
cross-entropy only, without entropies: it is beside the others as a floor. --smoke: tiny shapes on a CPU, in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if "--smoke" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton's first import

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_pz.models.logprobs import token_log_probs

SHAPES = {  # (hidden size, rows of the head, tokens)
    "Qwen3-4B": (2560, 151936, 8192),
    "Qwen3-30B-A3B": (2048, 151936, 8192),
    "SmolLM2-135M": (576, 49152, 8192),
}
SMOKE = {"smoke": (64, 512, 16)}
AIM = "fused at least 2 times as fast as naive, with a tenth of its memory"
Side = Callable[[Tensor, Tensor, Tensor], Tensor]


def naive(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = (hidden @ weight.t()).float()
    log_probs = F.log_softmax(logits, -1)
    entropy = -(log_probs.detach().exp() * log_probs.detach()).sum(-1)
    return log_probs.gather(1, labels[:, None]).sum() + 0 * entropy.sum()


def ours(fused: bool) -> Side:
    def side(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        log_probs, _ = token_log_probs(
            hidden,
            weight,
            labels,
            vocab_size=weight.shape[0],
            chunk_tokens=1024,
            wanted=torch.arange(labels.shape[0], device=labels.device),
            fused=fused,
        )
        return log_probs.sum()

    return side


def liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    return -LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, labels)


SIDES: dict[str, Side] = {"naive": naive, "chunked": ours(False), "fused": ours(True), "liger (no entropy)": liger}


def measure(side: Side, inputs: tuple[Tensor, Tensor, Tensor], on_gpu: bool) -> tuple[float, float]:
    """(seconds, bytes above the inputs at the peak) of a forward and a backward."""
    hidden, weight, labels = inputs
    hidden.grad = weight.grad = None
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    side(hidden, weight, labels).backward()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return seconds, float(torch.cuda.max_memory_allocated() - before) if on_gpu else 0.0


def compare(shape: tuple[int, int, int], device: str, rounds: int) -> dict[str, Any]:
    """Each side's figures for one shape, or why it has none."""
    width, rows, tokens = shape
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16
    hidden = torch.randn(tokens, width, device=device, generator=generator).to(dtype).requires_grad_()
    weight = (0.02 * torch.randn(rows, width, device=device, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(0, rows, (tokens,), device=device, generator=generator)
    found: dict[str, Any] = {name: {"seconds": [], "peak_bytes": []} for name in SIDES}
    for number in range(rounds + 1):  # the first compiles
        for name, side in SIDES.items():
            if "why_not" in found[name]:
                continue
            try:
                seconds, peak = measure(side, (hidden, weight, labels), device == "cuda")
            except (ImportError, RuntimeError) as error:  # not installed, no room, or not for this device
                found[name] = {"why_not": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
                continue
            if number:
                found[name]["seconds"].append(seconds)
                found[name]["peak_bytes"].append(peak)
            found[name]["grad_norm"] = float(hidden.grad.float().norm())  # all sides must have the same
    found["floor_flops"] = 6 * tokens * width * rows
    return found


def table(record: dict[str, Any]) -> str:
    lines = [
        "| shape | side | ms, median (least to most) | of naive | TFLOP/s of the 6 TVH | peak MiB | of naive |",
        "|---|---|---|---|---|---|---|",
    ]
    for shape, sides in record["shapes"].items():
        floor = sides["floor_flops"]
        base = sides["naive"]
        for name in SIDES:
            side = sides[name]
            if "why_not" in side:
                lines.append(f"| {shape} | {name} | {side['why_not']} | | | | |")
                continue
            median, peak = statistics.median(side["seconds"]), max(side["peak_bytes"])
            ratio = "" if "why_not" in base else f"{statistics.median(base['seconds']) / median:.2f}"
            share = "" if "why_not" in base or not max(base["peak_bytes"]) else f"{peak / max(base['peak_bytes']):.3f}"
            spread = f"{1e3 * median:.2f} ({1e3 * min(side['seconds']):.2f} to {1e3 * max(side['seconds']):.2f})"
            lines.append(
                f"| {shape} | {name} | {spread} | {ratio} | {floor / median / 1e12:.1f} | {peak / 2**20:.0f} | {share} |"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--rounds", type=int, default=10)
    own = parser.parse_args()
    if not own.smoke and not torch.cuda.is_available():
        sys.stderr.write("logprobs: no CUDA device is here; --smoke tries everything out on a CPU.\n")
        return 2
    device = "cpu" if own.smoke else "cuda"
    shapes = SMOKE if own.smoke else SHAPES
    record = {
        "what": "forward and backward of log-probs and entropies, bfloat16",
        "aim": AIM,
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU, Triton's interpreter: times mean nothing",
        "torch": torch.__version__,
        "shapes": {name: compare(shape, device, 1 if own.smoke else own.rounds) for name, shape in shapes.items()},
    }
    own.out.mkdir(parents=True, exist_ok=True)
    text = f"{record['device']}, torch {record['torch']}. Aim: {AIM}.\n\n{table(record)}\n"
    (own.out / "logprobs.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (own.out / "logprobs.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
