"""The clipped objective of a whole micro-batch with its gradients, from hidden states: ours, Liger's and TRL's, one GPU.

8 responses of 1024 trained tokens each. Ours is the fused head and `train.loss.policy_loss`, as an update runs them; Liger's is
`LigerFusedLinearGRPOLoss`; TRL's trainer has no loss function of its own to call, so its side is TRL's log-prob kernel and
the formula of its `dapo` loss. All divide by the number of trained tokens, without a KL term. Time, peak memory, and how far
loss and gradients are from naive logits in float32.

Usage: grpo_loss.py [--out DIR] [--rounds 5] [--smoke]
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from logprobs import SMOKE, TRL_COLUMNS, measured, naive, ours, run
from torch import Tensor

from megatron_pz.train.loss import policy_loss

RESPONSES = 8
LOW, HIGH = 0.2, 0.28
Objective = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden [n, H], weight [V, H], labels [n]) -> loss, scalar."""


def clipped(log_probs: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """The formula alone; all [n]."""
    ratio = (log_probs - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - LOW, 1 + HIGH) * advantages).mean()


def objectives(old: Tensor, advantages: Tensor) -> tuple[dict[str, Objective], dict[str, str]]:
    """What can be compared here, and why the rest cannot; `old` [n], `advantages` [responses]."""
    spread = advantages.repeat_interleave(len(old) // RESPONSES)
    weights = torch.ones_like(old)

    def fused(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        found = ours("fused")(hidden, weight, labels)
        return policy_loss(found, old, spread, weights, eps_clip=LOW, eps_clip_high=HIGH)[0] / len(old)

    sides: dict[str, Objective] = {"naive": lambda h, w, y: clipped(naive(h, w, y), old, spread), "fused": fused}
    missing: dict[str, str] = {}
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
    except ImportError as error:
        missing["liger"] = str(error)
    else:
        kernel = LigerFusedLinearGRPOLoss(
            beta=0.0, compiled=not SMOKE, use_ref_model=False, epsilon_low=LOW, epsilon_high=HIGH, loss_type="dapo"
        )

        def liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            rows = labels.view(RESPONSES, -1)
            loss: Tensor = kernel(
                hidden.view(*rows.shape, -1),
                weight,
                rows,
                torch.ones_like(rows),
                advantages,
                old_per_token_logps=old.view_as(rows),
            )[0]
            return loss

        sides["liger"] = liger
    try:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    except ImportError as error:
        missing["trl"] = str(error)
    else:

        def trl(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            given = (hidden, weight, None, labels, 1.0, TRL_COLUMNS, None, 1.0, ("entropy",))
            return clipped(ChunkedLogProbFunction.apply(*given)[0], old, spread)

        sides["trl"] = trl
    return sides, missing


def compare(shape: tuple[int, int, int], rounds: int, on: torch.device) -> dict[str, Any]:
    """Medians of every side, in turns; a side that fails says why."""
    tokens, width, vocab_size = shape
    dtype = torch.float32 if SMOKE else torch.bfloat16
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device=on).to(dtype).requires_grad_()
    weight = (torch.randn(vocab_size, width, device=on) * width**-0.5 * 3).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab_size, (tokens,), device=on)
    with torch.no_grad():  # ratios around 1, some of them clipped
        old = ours("fused")(hidden, weight, labels) + 0.2 * torch.randn(tokens, device=on)
    advantages = torch.linspace(-1.5, 1.5, RESPONSES, device=on)
    sides, missing = objectives(old, advantages)
    exact = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    wanted = sides["naive"](exact[0], exact[1], labels)
    gradients = torch.autograd.grad(wanted, exact)
    del exact
    runs: dict[str, list[tuple[float, int]]] = {name: [] for name in sides}
    errors: dict[str, dict[str, float]] = {}
    for number in range(rounds + 1):
        for name, side in sides.items():
            if name in missing:
                continue
            try:
                forward, backward, peak, loss = measured(side, (hidden, weight, labels), torch.ones((), device=on))
            except (
                RuntimeError,
                ValueError,
                AssertionError,
                TypeError,
                ImportError,
            ) as error:  # a peer that refuses is a finding
                missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                continue
            if number:  # the first compiles
                runs[name].append((forward + backward, peak))
            elif hidden.grad is not None and weight.grad is not None:
                off = [
                    float((a.float() - b).norm() / b.norm())
                    for a, b in zip((hidden.grad, weight.grad), gradients, strict=True)
                ]
                errors[name] = {"loss": abs(float(loss - wanted.detach())), "hidden": off[0], "weight": off[1]}
    found = {
        name: {
            "ms": statistics.median(seconds for seconds, _ in figures) * 1e3,
            "peak_mib": max(peak for _, peak in figures) / 2**20,
            "errors": errors[name],
        }
        for name, figures in runs.items()
        if figures and name not in missing
    }
    return {"sides": found, "missing": missing}


def rows(name: str, result: dict[str, Any], gradients_mib: float) -> list[dict[str, Any]]:
    """A line of the table a side."""
    found, base = [], result["sides"].get("naive", {})
    for side, x in result["sides"].items():
        off = ", ".join(f"{what} {value:.1e}" for what, value in x["errors"].items())
        text = f"{x['ms']:.2f} ms, {x['ms'] / base['ms']:.2f} of naive's, " if base else f"{x['ms']:.2f} ms, "
        text += f"peak {x['peak_mib']:.0f} MiB (gradients {gradients_mib:.0f}); off by {off}"
        found.append({"what": f"GRPO loss, {name} shape: {side}", "measured": text, **x})
    return found + [
        {"what": f"GRPO loss, {name} shape: {side}", "reason": why} for side, why in result["missing"].items()
    ]


if __name__ == "__main__":
    run(__doc__ or "", "grpo_loss", compare, rows)
