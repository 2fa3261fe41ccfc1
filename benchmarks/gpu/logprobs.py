"""Log-probs of labels with their gradients, at real shapes on one GPU: time and peak memory of naive logits, chunks, the
fused kernel, Liger's fused linear cross entropy and Megatron-Core's own, where they are.

Every side makes [n] log-probs of 8192 trained tokens (the first two also entropies) and both gradients, by turns, in
bfloat16. Peak memory is what is taken beyond the inputs, gradients included: those take the same on every side.
`--smoke` runs tiny shapes, on a CPU by Triton's interpreter: it shows that the script works, its times mean nothing.

Usage: logprobs.py --out DIR [--rounds 5] [--smoke]        writes DIR/logprobs.json and DIR/logprobs.md
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

SMOKE = "--smoke" in sys.argv
if SMOKE:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_pz.models.logprobs import token_log_probs  # noqa: E402

SHAPES = {  # tokens, hidden size, vocabulary
    "SmolLM2-135M": (8192, 576, 49152),
    "Qwen3-30B-A3B": (8192, 2048, 151936),
    "Qwen3-4B": (8192, 2560, 151936),
}
TINY = {"tiny": (16, 48, 200)}
Side = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden [n, H], weight [V, H], labels [n]) -> log-probs [n]."""


def naive(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Whole logits in float32; the entropy too, without gradient."""
    spread = (hidden @ weight.t()).float().log_softmax(-1)
    with torch.no_grad():
        torch.special.entr(spread.exp()).sum(-1)
    return spread.gather(1, labels[:, None])[:, 0]


def ours(kernel: Any) -> Side:
    """One of ours."""

    def side(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        wanted = torch.arange(len(labels), device=labels.device)
        return token_log_probs(
            hidden, weight, labels, vocab_size=weight.shape[0], chunk_tokens=1024, wanted=wanted, kernel=kernel
        )[0]

    return side


def sides() -> tuple[dict[str, Side], dict[str, str]]:
    """What can be compared here, and why the rest cannot."""
    found: dict[str, Side] = {"naive": naive, "chunked": ours("chunked"), "fused": ours("fused")}
    missing: dict[str, str] = {}
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    except ImportError as error:
        missing["liger"] = str(error)
    else:

        def liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            """Cross entropies of tokens; the gradient of the weight summed in float32, as ours."""
            arguments = (None, None, -100, 0.0, 0.0, "none", None, False, torch.float32)
            return -LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, labels, *arguments)[0]

        found["liger"] = liger
    try:
        from megatron.core.fusions.fused_linear_cross_entropy import linear_cross_entropy

        if not torch.cuda.is_available():
            missing["megatron"] = "needs CUDA"
        else:
            found["megatron"] = lambda h, w, y: -linear_cross_entropy(h, w, y, None, "none")
    except ImportError as error:
        missing["megatron"] = str(error)
    return found, missing


def measured(side: Side, given: tuple[Tensor, Tensor, Tensor], factors: Tensor) -> tuple[float, float, int, Tensor]:
    """Seconds forward, seconds backward, peak bytes beyond the inputs (0 on a CPU), log-probs."""
    hidden, weight, labels = given
    hidden.grad = weight.grad = None
    is_cuda = hidden.is_cuda
    if is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if is_cuda else 0
    start = time.perf_counter()
    log_probs = side(hidden, weight, labels)
    if is_cuda:
        torch.cuda.synchronize()
    middle = time.perf_counter()
    (log_probs.float() * factors).sum().backward()
    if is_cuda:
        torch.cuda.synchronize()
    end = time.perf_counter()
    peak = torch.cuda.max_memory_allocated() - held if is_cuda else 0
    return middle - start, end - middle, peak, log_probs.detach()


def compare(shape: tuple[int, int, int], rounds: int, device: torch.device) -> dict[str, Any]:
    """Medians of every side, in turns; a side that fails says why."""
    tokens, width, vocab_size = shape
    dtype = torch.float32 if SMOKE else torch.bfloat16
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(vocab_size, width, device=device) * width**-0.5 * 3).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab_size, (tokens,), device=device)
    factors = torch.linspace(-1.0, 1.0, tokens, device=device)
    here, missing = sides()
    runs: dict[str, list[tuple[float, float, int]]] = {name: [] for name in here}
    log_probs: dict[str, Tensor] = {}
    for number in range(rounds + 1):
        for name, side in here.items():
            if name in missing:
                continue
            try:
                *figures, log_probs[name] = measured(side, (hidden, weight, labels), factors)
            except (RuntimeError, ValueError, AssertionError, TypeError) as error:  # a peer that refuses is a finding
                missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                continue
            if number:  # the first compiles and chooses tiles
                runs[name].append((figures[0], figures[1], int(figures[2])))
    exact = F.linear(hidden[:256].detach().double(), weight.detach().double()).log_softmax(-1)
    exact = exact.gather(1, labels[:256, None])[:, 0]
    result: dict[str, Any] = {
        "tokens": tokens,
        "hidden": width,
        "vocabulary": vocab_size,
        "missing": missing,
        "sides": {},
    }
    for name, figures in runs.items():
        if not figures or name in missing:
            continue
        forward, backward = (statistics.median(values) for values in list(zip(*figures, strict=True))[:2])
        seconds = [a + b for a, b, _ in figures]
        operations = 6 * tokens * width * vocab_size  # what is needed; recomputation is not counted
        result["sides"][name] = {
            "forward_ms": forward * 1e3,
            "backward_ms": backward * 1e3,
            "total_ms": statistics.median(seconds) * 1e3,
            "total_ms_range": [min(seconds) * 1e3, max(seconds) * 1e3],
            "tflops": operations / statistics.median(seconds) / 1e12,
            "peak_mib": max(peak for *_, peak in figures) / 2**20,
            "largest_error": (log_probs[name][:256].double() - exact).abs().max().item(),
        }
    return result


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| shape | side | forward ms | backward ms | both (range) | of naive's time | peak MiB | of naive's | TFLOP/s | error |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for shape, result in results.items():
        base = result["sides"].get("naive")
        for name, x in result["sides"].items():
            low, high = x["total_ms_range"]
            time_share = f"{x['total_ms'] / base['total_ms']:.2f}" if base else "-"
            memory_share = f"{x['peak_mib'] / base['peak_mib']:.2f}" if base and base["peak_mib"] else "-"
            lines.append(
                f"| {shape} | {name} | {x['forward_ms']:.2f} | {x['backward_ms']:.2f} | {x['total_ms']:.2f} ({low:.2f} to "
                f"{high:.2f}) | {time_share} | {x['peak_mib']:.0f} | {memory_share} | {x['tflops']:.1f} | "
                f"{x['largest_error']:.1e} |"
            )
        lines += [f"| {shape} | {name}: {why} | | | | | | | | |" for name, why in result["missing"].items()]
    return "\n".join(lines) + "\n"


def installed(package: str) -> str:
    """Its version."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def main() -> None:
    """Measure, write both files, print the table last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of logprobs.json and logprobs.md")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, also without a GPU")
    arguments = parser.parse_args()
    if not arguments.smoke and not torch.cuda.is_available():
        sys.exit("logprobs.py: torch sees no CUDA device; it needs one, or --smoke to see that the script works.")
    device = torch.device("cpu" if arguments.smoke else "cuda")
    rounds = 1 if arguments.smoke else arguments.rounds
    results = {name: compare(shape, rounds, device) for name, shape in (TINY if arguments.smoke else SHAPES).items()}
    card = torch.cuda.get_device_name() if device.type == "cuda" else "a CPU, Triton interpreted: times mean nothing"
    versions = {package: installed(package) for package in ("torch", "triton", "liger-kernel", "megatron-core")}
    record = {"date": str(date.today()), "device": card, "smoke": SMOKE, "versions": versions, "shapes": results}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "logprobs.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    told = f"{record['date']}, {card}; " + ", ".join(f"{package} {number}" for package, number in versions.items())
    text = f"# Log-probs and their gradients\n\n{told}.\n\n{table(results)}"
    (arguments.out / "logprobs.md").write_text(text, encoding="utf-8")
    print("\n" + table(results))


if __name__ == "__main__":
    main()
