"""Log-probabilities of labels and entropies, from hidden states and the head's weight, a chunk of tokens at a time.

1. Logits exist for `chunk_tokens` tokens at a time, in the forward and again in the backward, which recomputes them;
   [T, V] is never held.
2. The vocabulary may be cut over a tensor-parallel group; each rank sees its own rows and two reductions a chunk.
3. Rows of the padded vocabulary take no part: neither in the log-sum-exp, nor in the entropy, nor in a gradient.
4. Tokens whose label is below 0 are not wanted and cost nothing: prompts need no head, and most tokens are prompts.

`kernel = "fused"` does the same by Triton, see `kernels/fused_log_probs.py`; this file's own way is its reference.

Shapes: T tokens, H hidden size, V rows of the head on this rank, c tokens of a chunk, v rows that
are no padding.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_pz.errors import ConfigError

LogProbKernel = Literal["chunked", "fused"]


def chosen_kernel(setting: str, device: torch.device, dtype: torch.dtype) -> LogProbKernel:
    """The kernel that `train.log_prob_kernel` means on a device, for weights of a dtype.

    Args:
        setting: `auto`, `chunked` or `fused`.

    Raises:
        ConfigError: `fused` is asked for where it cannot be had; it is never replaced silently.
    """
    has_triton = importlib.util.find_spec("triton") is not None
    is_possible = dtype is not torch.float64 and has_triton
    if setting == "auto":
        return "fused" if is_possible and device.type == "cuda" else "chunked"
    # "meta" is the planner's: it runs nothing, and asks for another machine than its own.
    runs_here = device.type in ("cuda", "meta") or os.environ.get("TRITON_INTERPRET") == "1"
    if setting == "fused" and not (device.type == "meta" or (is_possible and runs_here)):
        found = "triton is not installed" if not has_triton else f"weights are {dtype} on {device.type}"
        raise ConfigError(
            f'train.log_prob_kernel is "fused", but {found}; it needs Triton, CUDA and float32, bfloat16 or float16. '
            'Use "auto" or "chunked" (on a CPU, TRITON_INTERPRET=1 runs it for tests, very slowly).'
        )
    return "fused" if setting == "fused" else "chunked"


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int,
    chunk_tokens: int,
    tp_group: dist.ProcessGroup | None = None,
    wanted: Tensor | None = None,
    kernel: LogProbKernel = "chunked",
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label, and entropy of its distribution, under softmax(logits / temperature).

    The gradient of `hidden` is this rank's part, of its own rows; the caller sums it over the group
    (`copy_to_tensor_model_parallel_region`, or the gather of sequence parallelism).

    Args:
        hidden: [T, H], whole on every rank of the group.
        weight: [V, H], rows `rank * V` to `(rank + 1) * V` of the padded head.
        labels: int64 [T], over the whole vocabulary; below 0 where nothing is wanted (both results are 0 there).
        temperature: above 0.
        vocab_size: real rows over the whole group; the rest is padding.
        chunk_tokens: tokens whose logits exist at one time.
        tp_group: ranks that share the vocabulary; None or a group of one: this rank has it all.
        wanted: int64 [n], places of all labels that are not below 0, rising; None: they are looked for, for which the host
            waits for the device.
        kernel: from `chosen_kernel`; float64 is always chunked. With bfloat16 inputs "fused" has its logits in float32
            where "chunked" rounds them to bfloat16.

    Returns:
        (log_probs [T], entropy [T] in nats without gradient), float32 (float64 of float64 hidden states).

    Source: d log softmax(z)_y / dz = onehot(y) - softmax(z); vocabulary-parallel as Megatron's cross entropy.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0 (log-probs of greedy sampling: use 1.0)")
    group = tp_group if tp_group is not None and tp_group.size() > 1 else None
    if wanted is None:
        wanted = (labels >= 0).nonzero().squeeze(1)
    chosen, chosen_labels = hidden.index_select(0, wanted), labels.index_select(0, wanted)
    if kernel == "fused" and hidden.dtype is not torch.float64:
        from megatron_pz.models.kernels.fused_log_probs import FusedTokenLogProbs  # Triton is not on every machine

        first, rows = _own_rows(weight, vocab_size, group)
        log_probs, entropy = FusedTokenLogProbs.apply(
            chosen, weight, chosen_labels, temperature, first, rows.shape[0], group
        )
    else:
        log_probs, entropy = _TokenLogProbs.apply(
            chosen, weight, chosen_labels, temperature, vocab_size, chunk_tokens, group
        )
    nothing = log_probs.new_zeros(labels.shape)
    return nothing.index_copy(0, wanted, log_probs), nothing.index_copy(0, wanted, entropy)


def _own_rows(weight: Tensor, vocab_size: int, group: dist.ProcessGroup | None) -> tuple[int, Tensor]:
    """First row of this rank in the whole vocabulary, and its rows [v, H] that are no padding (a view)."""
    first = dist.get_rank(group) * weight.shape[0] if group is not None else 0
    return first, weight[: min(max(vocab_size - first, 0), weight.shape[0])]


def _logits(hidden: Tensor, rows: Tensor, temperature: float) -> Tensor:
    """[c, v] in float32 or float64; nobody else's memory."""
    logits = hidden @ rows.t()
    accumulated = torch.float64 if hidden.dtype is torch.float64 else torch.float32
    return logits.to(accumulated).div_(temperature)


def _own_labels(labels: Tensor, first: int, num_rows: int) -> tuple[Tensor, Tensor]:
    """Which labels are rows of this rank, bool [c], and their places among the rows, int64 [c] (0 for the others)."""
    place = labels - first
    is_own = (place >= 0) & (place < num_rows)
    return is_own, torch.where(is_own, place, torch.zeros_like(place))


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: float,
        vocab_size: int,
        chunk_tokens: int,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        first, rows = _own_rows(weight, vocab_size, group)
        chunks = zip(hidden.split(chunk_tokens), labels.split(chunk_tokens), strict=True)
        parts = [_chunk_forward(_logits(h, rows, temperature), y, first, group) for h, y in chunks]
        log_probs, entropy, log_normalizer = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, labels, log_normalizer)
        ctx.settings = (temperature, vocab_size, chunk_tokens, group)
        ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, grad_log_probs: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, log_normalizer = ctx.saved_tensors
        temperature, vocab_size, chunk_tokens, group = ctx.settings
        first, rows = _own_rows(weight, vocab_size, group)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        accumulated = log_normalizer.dtype  # a sum over chunks in bfloat16 would lose the small ones
        grad_weight = torch.zeros_like(weight, dtype=accumulated) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0], chunk_tokens):
            at = slice(start, start + chunk_tokens)
            logits = _logits(hidden[at], rows, temperature)
            grad = _chunk_backward(logits, labels[at], log_normalizer[at], grad_log_probs[at] / temperature, first)
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, rows, out=grad_hidden[at])
            if grad_weight is not None:
                _add_outer(grad_weight[: rows.shape[0]], grad, hidden[at])
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None, None, None


def _chunk_forward(
    logits: Tensor, labels: Tensor, first: int, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropies and log-normalizers [c] each; `logits` [c, v] are overwritten."""
    num_tokens, num_rows = logits.shape
    # A rank may hold padding only: a vocabulary that is small beside its padding.
    largest = logits.amax(1) if num_rows else logits.new_full((num_tokens,), -torch.inf)
    if group is not None and num_tokens:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    shifted = logits.sub_(largest[:, None])
    is_own, place = _own_labels(labels, first, num_rows)
    sums = logits.new_zeros(3, num_tokens)  # of exp(z), of exp(z) * z, and the label's z
    if num_rows:
        sums[2] = torch.where(is_own, shifted.gather(1, place[:, None])[:, 0], sums[2])
        exponentials = shifted.exp()
        sums[0] = exponentials.sum(1)
        sums[1] = torch.einsum("cv,cv->c", exponentials, shifted)
    if group is not None and num_tokens:
        dist.all_reduce(sums, group=group)
    log_sum = sums[0].log()
    return sums[2] - log_sum, log_sum - sums[1] / sums[0], largest + log_sum


def _chunk_backward(logits: Tensor, labels: Tensor, log_normalizer: Tensor, grad: Tensor, first: int) -> Tensor:
    """Gradient of the logits [c, v], in their memory."""
    is_own, place = _own_labels(labels, first, logits.shape[1])
    grad_logits = logits.sub_(log_normalizer[:, None]).exp_().mul_(-grad[:, None])
    if logits.shape[1]:
        grad_logits.scatter_add_(1, place[:, None], torch.where(is_own, grad, torch.zeros_like(grad))[:, None])
    return grad_logits


def _add_outer(total: Tensor, grad: Tensor, hidden: Tensor) -> None:
    """Add grad^T hidden, [v, H], to `total`, in place where the dtypes allow."""
    if total.dtype is hidden.dtype:
        total.addmm_(grad.t(), hidden)
    else:
        total.add_(grad.t() @ hidden)
