"""Log-probabilities and entropies as `models.logprobs` computes them, without logits in memory: for GPUs.

1. The forward reads hidden states and head once and writes four numbers a token (`logprob_kernels.logit_sums`).
2. The backward computes logits once more, for `TILE_ROWS` rows of the head at a time, and writes their gradient: [T, tile] is all
   that there is of [T, V]. Two products of the library (cuBLAS) make the gradients of it. Each row of the head's gradient is
   written once, by one product, and no atomics are used: equal inputs give equal bits.
3. Under tensor parallelism each rank sees its own rows, and two reductions of a few numbers a token join them.

Operations: 2 T V H forward, 6 T V H backward (2 more than with logits kept, which is the price). Bytes above inputs and gradients:
4 T H for the sum of the hidden states' gradient in float32, and T x tile x 2.

Liger's and Megatron's fused kernels are for a cross-entropy's mean, without entropy: docs/decisions/0005-logprob-kernel.md.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_pz.errors import ConfigError

TILE_ROWS = 8192
"""Rows of the head whose logits' gradient exists at one time: at 8192 tokens 128 MiB in bfloat16."""


def check_available(device: torch.device) -> None:
    """Returns where the kernels can run.

    Raises:
        ConfigError: Triton is missing, or would have to compile for a CPU.
    """
    try:
        import triton
    except ImportError as error:
        raise ConfigError(
            "train.log_prob_kernel is 'fused', which needs Triton (it comes with torch for CUDA); use 'chunked' here."
        ) from error
    if device.type == "cpu" and not triton.knobs.runtime.interpret:
        raise ConfigError(
            "train.log_prob_kernel is 'fused' on a CPU; Triton compiles for GPUs. Use 'chunked', or for a trial of small size set "
            "TRITON_INTERPRET=1 before the program starts."
        )


class FusedLogProbs(torch.autograd.Function):
    """Log-probs and entropies, float32 [T], of hidden states [T, H] and this rank's rows of the padded head, [V, H]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: float,
        first_row: int,
        num_rows: int,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        from megatron_pz.models.logprob_kernels import logit_sums, rescaled

        """`num_rows` of `weight` are no padding, and the first of them is `first_row` of the whole vocabulary."""
        hidden, rows = hidden.contiguous(), weight[:num_rows]
        if hidden.shape[0]:
            largest, total, product, label = logit_sums(hidden, rows, labels, first_row, temperature)
        else:
            largest, total, product, label = (hidden.new_empty(0, dtype=torch.float32) for _ in range(4))
        if group is not None and hidden.shape[0]:
            own = largest
            largest = own.clone()
            dist.all_reduce(largest, dist.ReduceOp.MAX, group)
            sums = torch.stack([*rescaled(own, total, product, largest), label])
            dist.all_reduce(sums, group=group)
            total, product, label = sums
        log_total = total.log()
        log_normalizer = largest + log_total
        entropy = log_total - product / total
        ctx.save_for_backward(hidden, weight, labels, log_normalizer)
        ctx.settings = (temperature, first_row, num_rows)
        ctx.mark_non_differentiable(entropy)
        return label - log_normalizer, entropy

    @staticmethod
    def backward(ctx: Any, grad_log_probs: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        from megatron_pz.models.logprob_kernels import logit_gradient

        hidden, weight, labels, log_normalizer = ctx.saved_tensors
        temperature, first_row, num_rows = ctx.settings
        num_tokens, rows = hidden.shape[0], weight[:num_rows]
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = hidden.new_zeros(hidden.shape, dtype=torch.float32) if wants_hidden else None
        grad_weight = torch.empty_like(weight) if wants_weight else None
        if grad_weight is not None:
            grad_weight[num_rows if num_tokens else 0 :].zero_()
        out = hidden.new_empty(num_tokens * min(TILE_ROWS, num_rows))
        grad = grad_log_probs.contiguous()
        for start in range(0, num_rows if num_tokens else 0, TILE_ROWS):
            at = slice(start, min(start + TILE_ROWS, num_rows))
            logits_grad = logit_gradient(hidden, rows, labels, log_normalizer, grad, first_row, temperature, at, out)
            if grad_hidden is not None:
                grad_hidden += _product(logits_grad, rows[at])
            if grad_weight is not None:
                torch.mm(logits_grad.t(), hidden, out=grad_weight[at])
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, *(None,) * 5


def _product(left: Tensor, right: Tensor) -> Tensor:
    """float32 product: tiles' sums must not be rounded to bfloat16 before they are added up."""
    if left.dtype is torch.float32:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()
