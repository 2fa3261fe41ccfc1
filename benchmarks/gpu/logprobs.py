"""Log-probs of labels with their gradients, at real shapes on one GPU: time and peak memory of naive logits, chunks, the
fused kernel, Liger's fused linear cross entropy, TRL's chunked log-probs and Megatron-Core's own, where they are.

Every side makes [n] log-probs of 8192 trained tokens (the first two also entropies) and both gradients, by turns, in
bfloat16. Peak memory is what is taken beyond the inputs, gradients included: those take the same on every side.
`--smoke` runs tiny shapes, on a CPU by Triton's interpreter: it shows that the script works, its times mean nothing.

Usage: logprobs.py [--out DIR] [--rounds 5] [--smoke]
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

SMOKE = "--smoke" in sys.argv
if SMOKE:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from common import Record, arguments, device, machine  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_pz.models.logprobs import token_log_probs  # noqa: E402

SHAPES = {  # tokens, hidden size, vocabulary
    "SmolLM2-135M": (8192, 576, 49152),
    "Qwen3-30B-A3B": (8192, 2048, 151936),
    "Qwen3-4B": (8192, 2560, 151936),
}
TRL_COLUMNS = 32768
"""Of the vocabulary a tile: what TRL's own trainer passes."""
TINY = {"tiny": (16, 48, 200)}
TIME_AIM, MEMORY_AIM = 0.5, 0.1
"""Of naive's; memory beyond the gradients, which every side has to hold."""
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
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    except ImportError as error:
        missing["trl"] = str(error)
    else:

        def trl(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            """TRL's tiles of cuBLAS products, each folded by a Triton kernel; the entropy too, as ours."""
            return ChunkedLogProbFunction.apply(
                hidden, weight, None, labels, 1.0, TRL_COLUMNS, None, 1.0, ("entropy",)
            )[0]

        found["trl"] = trl
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
            except (
                RuntimeError,
                ValueError,
                AssertionError,
                TypeError,
                ImportError,
            ) as error:  # a peer that refuses is a finding
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
    for name, kept in runs.items():
        if not kept or name in missing:
            continue
        forward, backward = (statistics.median(values) for values in list(zip(*kept, strict=True))[:2])
        seconds = [a + b for a, b, _ in kept]
        operations = 6 * tokens * width * vocab_size  # what is needed; recomputation is not counted
        result["sides"][name] = {
            "forward_ms": forward * 1e3,
            "backward_ms": backward * 1e3,
            "total_ms": statistics.median(seconds) * 1e3,
            "total_ms_range": [min(seconds) * 1e3, max(seconds) * 1e3],
            "tflops": operations / statistics.median(seconds) / 1e12,
            "peak_mib": max(peak for _, _, peak in kept) / 2**20,
            "largest_error": (log_probs[name][:256].double() - exact).abs().max().item(),
        }
    return result


def gradient_mib(shape: tuple[int, int, int], itemsize: int) -> float:
    """Of hidden states and weight: what no side can do without."""
    tokens, width, vocab_size = shape
    return (tokens + vocab_size) * width * itemsize / 2**20


def rows(name: str, result: dict[str, Any], gradients_mib: float) -> list[dict[str, Any]]:
    """A line of the table a side; the fused kernel's has the aims."""
    base, found = result["sides"].get("naive"), []
    for side, x in result["sides"].items():
        low, high = x["total_ms_range"]
        text = (
            f"{x['total_ms']:.2f} ms ({low:.2f} to {high:.2f}), {x['tflops']:.0f} TFLOP/s, peak {x['peak_mib']:.0f} MiB"
        )
        line: dict[str, Any] = {"what": f"log-probs and gradients, {name} shape: {side}", **x}
        if base and side != "naive":
            line["of_naives_time"] = x["total_ms"] / base["total_ms"]
            text += f"; of naive's {line['of_naives_time']:.2f} of the time"
            if base["peak_mib"] > gradients_mib:
                beyond = (x["peak_mib"] - gradients_mib) / (base["peak_mib"] - gradients_mib)
                line["of_naives_memory"] = beyond
                text += f", {beyond:.2f} of the memory beyond gradients"
        if side == "fused" and "of_naives_memory" in line:
            line["aim"] = f"time <= {TIME_AIM}, memory <= {MEMORY_AIM} of naive's"
            line["met"] = line["of_naives_time"] <= TIME_AIM and line["of_naives_memory"] <= MEMORY_AIM
        found.append(line | {"measured": f"{text}; error {x['largest_error']:.1e}"})
    return found + [
        {"what": f"log-probs and gradients, {name} shape: {side}", "reason": why}
        for side, why in result["missing"].items()
    ]


def run(
    doc: str,
    part: str,
    compared: Callable[[tuple[int, int, int], int, torch.device], dict[str, Any]],
    told: Callable[[str, dict[str, Any], float], list[dict[str, Any]]],
) -> None:
    """The part from its arguments to its record: every shape compared, and told in rows."""
    parser = arguments(doc)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    on = torch.device("cpu") if given.smoke else device(False)  # Triton interprets in a smoke run
    record = Record(given.out, part, machine(on) | {"smoke": SMOKE})
    for name, shape in (TINY if given.smoke else SHAPES).items():
        result = compared(shape, 1 if given.smoke else given.rounds, on)
        record.add(*told(name, result, gradient_mib(shape, 4 if given.smoke else 2)))
    record.finish()


if __name__ == "__main__":
    run(__doc__ or "", "logprobs", compare, rows)
