"""Log-probabilities of labels and entropies by Triton: logits live in registers, [n, V] is never written.

Forward: one program a block of tokens and a stretch of `SPLIT_ROWS` vocabulary rows. It multiplies tile by tile, and
keeps of each token the largest logit, sum of exp(z), sum of exp(z) * z and the label's logit. What the stretches found is put
together by torch, with two small reductions over the tensor-parallel group.

Backward: by stretches of the vocabulary, as many rows as `GRADIENT_BYTES` hold. A kernel computes the stretch's logits once
more and writes their gradient [n, rows] in the precision of the hidden states; cuBLAS makes of it the stretch's gradient
of the weight, once and for good, and adds to that of the hidden states in float32. No atomics: the same inputs
give the same bits, on the same card with the same configuration.

Floor, for n tokens, H, V rows of this rank, and b bytes an element:
    operations  2nVH forward, 6nVH backward; a quarter of the whole is logits made a second time, and half of it is cuBLAS's
    bytes       forward (n + V) H b read; backward 3nV b for the gradient of the logits, written once and read by two products,
                V H b read twice and written once, and 8nH a stretch for the float32 sum
    memory      min(nV b, GRADIENT_BYTES) and 4nH backward, 16 n V / SPLIT_ROWS forward; naive logits and their softmax
                take 8nV and more

Shapes: n tokens, H hidden size, v rows of this rank that are no padding, S stretches of `SPLIT_ROWS` rows.
Import only where Triton is: `models.logprobs` does so when it is asked for this kernel.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Triton runs the kernels on CPU tensors by numpy: for tests. It decides when it is imported."""

_WIDENS = tl.constexpr(INTERPRETED)  # the interpreter multiplies bfloat16 as the integers that it keeps it in

_GROUP = tl.constexpr(16)

SPLIT_ROWS = 128 if INTERPRETED else 4096
"""Vocabulary rows of a forward program: few, so that also a micro-batch of some hundred trained tokens fills the card
(4 blocks x 38 stretches at V = 151936). A multiple of every BLOCK_V."""

GRADIENT_BYTES = 1 << (13 if INTERPRETED else 28)
"""Most memory for the gradient of logits: 256 MiB; 16384 columns of 8192 tokens in bfloat16."""

SMALL = 512
"""Tokens up to which other tiles may be best: tiles are chosen once for micro-batches up to it, and once for larger ones."""

GRADIENT_ROWS = 64 if INTERPRETED else 256
"""Columns of that gradient are a multiple of it, and at least it."""


def _configs() -> list[triton.Config]:
    """Tiles to choose from, at a shape's first call; the last ones also fit float32 into shared memory."""
    if INTERPRETED:  # nothing can be timed there, and one needs no choice
        return [triton.Config({"BLOCK_T": 16, "BLOCK_V": 64, "BLOCK_H": 32}, num_warps=4)]
    tiles = [
        *((128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (256, 128, 64, 8, 3), (128, 128, 64, 4, 4), (128, 128, 64, 8, 4)),
        *((64, 256, 64, 8, 4), (64, 128, 64, 4, 4), (128, 128, 32, 8, 3), (64, 64, 32, 4, 3)),
    ]
    return [
        triton.Config({"BLOCK_T": t, "BLOCK_V": v, "BLOCK_H": h}, num_warps=warps, num_stages=stages)
        for t, v, h, warps, stages in tiles
    ]


@triton.jit
def _own_blocks(num_token_blocks, num_row_blocks):
    """Block of tokens and block of rows of this program. Programs that run at one time are those of `_GROUP` blocks of tokens and
    some of rows, so that what they read again and again (10 MiB of each at H = 2560) stays in the L2 cache."""
    program = tl.program_id(0)
    in_group = _GROUP * num_row_blocks
    first = program // in_group * _GROUP
    size = tl.minimum(num_token_blocks - first, _GROUP)
    return first + program % in_group % size, program % in_group // size


@triton.jit
def _logits_tile(
    hidden,
    weight,
    tokens,
    rows,
    num_tokens,
    num_rows,
    hidden_stride,
    weight_stride,
    H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """float32 [BLOCK_T, BLOCK_V], before the temperature; 0 where token or row do not exist."""
    h_at = hidden + tokens.to(tl.int64)[:, None] * hidden_stride
    w_at = weight + rows.to(tl.int64)[None, :] * weight_stride
    is_token, is_row = (tokens < num_tokens)[:, None], (rows < num_rows)[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)
    for start in range(0, H, BLOCK_H):
        columns = start + tl.arange(0, BLOCK_H)
        if H % BLOCK_H == 0:
            h = tl.load(h_at + columns[None, :], mask=is_token, other=0.0)
            w = tl.load(w_at + columns[:, None], mask=is_row, other=0.0)
        else:
            h = tl.load(h_at + columns[None, :], mask=is_token & (columns < H)[None, :], other=0.0)
            w = tl.load(w_at + columns[:, None], mask=is_row & (columns < H)[:, None], other=0.0)
        if _WIDENS:
            h, w = h.to(tl.float32), w.to(tl.float32)
        total = tl.dot(h, w, total, input_precision="ieee")  # TF32 would cost float32 its digits
    return total


@triton.autotune(configs=_configs(), key=["H", "num_rows", "is_small"])
@triton.jit(do_not_specialize=["num_tokens", "num_rows", "is_small"])  # else each divisibility of it is compiled for
def _forward_kernel(
    hidden,
    weight,
    places,
    found,
    num_tokens,
    num_rows,
    hidden_stride,
    weight_stride,
    inverse_temperature,
    is_small,
    H: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """found[:, split, token]: largest logit m, sum of exp(z - m), sum of exp(z - m) * (z - m), the label's logit."""
    num_splits = tl.cdiv(num_rows, SPLIT)
    block, split = _own_blocks(tl.cdiv(num_tokens, BLOCK_T), num_splits)
    tokens = block * BLOCK_T + tl.arange(0, BLOCK_T)
    exists = tokens < num_tokens
    place = tl.load(places + tokens, mask=exists, other=-1)
    # Finite, as -inf minus -inf is no number; every stretch has a row, which is larger.
    largest = tl.full((BLOCK_T,), -1e30, dtype=tl.float32)
    total = tl.zeros((BLOCK_T,), dtype=tl.float32)
    weighted = tl.zeros((BLOCK_T,), dtype=tl.float32)
    of_label = tl.zeros((BLOCK_T,), dtype=tl.float32)
    last = tl.minimum((split + 1) * SPLIT, num_rows)
    for first in range(split * SPLIT, last, BLOCK_V):
        rows = first + tl.arange(0, BLOCK_V)
        z = _logits_tile(
            hidden,
            weight,
            tokens,
            rows,
            num_tokens,
            num_rows,
            hidden_stride,
            weight_stride,
            H,
            BLOCK_T,
            BLOCK_V,
            BLOCK_H,
        )
        z *= inverse_temperature
        of_label += tl.sum(tl.where(rows[None, :] == place[:, None], z, 0.0), axis=1)
        is_row = (rows < num_rows)[None, :]
        now = tl.maximum(largest, tl.max(tl.where(is_row, z, -float("inf")), axis=1))
        shift, z = largest - now, z - now[:, None]
        exponential = tl.where(is_row, tl.exp(z), 0.0)
        scale = tl.exp(shift)
        weighted = scale * (weighted + total * shift) + tl.sum(exponential * z, axis=1)
        total = scale * total + tl.sum(exponential, axis=1)
        largest = now
    one = num_splits.to(tl.int64) * num_tokens
    at = found + split.to(tl.int64) * num_tokens + tokens
    tl.store(at, largest, mask=exists)
    tl.store(at + one, total, mask=exists)
    tl.store(at + 2 * one, weighted, mask=exists)
    tl.store(at + 3 * one, of_label, mask=exists)


# Not by `num_rows`: stretches have other sizes in each micro-batch, and a choice of tiles makes the host wait.
@triton.autotune(configs=_configs(), key=["H", "is_small"])
@triton.jit(do_not_specialize=["num_tokens", "first_row", "is_small"])
def _gradient_kernel(
    hidden,
    weight,
    places,
    log_normalizer,
    grad,
    grad_logits,
    num_tokens,
    num_rows,
    first_row,
    hidden_stride,
    weight_stride,
    inverse_temperature,
    is_small,
    H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Gradient of the logits before the temperature, [n, num_rows], of the stretch that begins at `first_row`."""
    token_block, row_block = _own_blocks(tl.cdiv(num_tokens, BLOCK_T), tl.cdiv(num_rows, BLOCK_V))
    tokens = token_block * BLOCK_T + tl.arange(0, BLOCK_T)
    rows = row_block * BLOCK_V + tl.arange(0, BLOCK_V)
    exists = tokens < num_tokens
    z = _logits_tile(
        hidden, weight, tokens, rows, num_tokens, num_rows, hidden_stride, weight_stride, H, BLOCK_T, BLOCK_V, BLOCK_H
    )
    normalizer = tl.load(log_normalizer + tokens, mask=exists, other=0.0)
    factor = tl.load(grad + tokens, mask=exists, other=0.0) * inverse_temperature
    place = tl.load(places + tokens, mask=exists, other=-1) - first_row
    probability = tl.exp(z * inverse_temperature - normalizer[:, None])
    change = factor[:, None] * (tl.where(rows[None, :] == place[:, None], 1.0, 0.0) - probability)
    at = grad_logits + tokens.to(tl.int64)[:, None] * num_rows + rows[None, :]
    tl.store(at, change.to(grad_logits.dtype.element_ty), mask=exists[:, None] & (rows < num_rows)[None, :])


class FusedTokenLogProbs(torch.autograd.Function):
    """As `models.logprobs._TokenLogProbs`, of wanted tokens only: labels are not below 0."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: float,
        first: int,
        num_rows: int,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        """(log_probs, entropy), float32 [n] each.

        Args:
            hidden: [n, H], float32, bfloat16 or float16.
            weight: [V, H], the same dtype.
            labels: int64 [n].
            temperature: above 0.
            first: this rank's first row in the whole vocabulary.
            num_rows: its rows that are no padding, from the first on.
            group: ranks that share the vocabulary; None: no others.
        """
        hidden, weight = hidden.contiguous(), weight.contiguous()
        places = labels - first  # of another rank's labels: below 0, or not below num_rows, where no row is
        largest, sums = _own_sums(hidden, weight, places, temperature, num_rows, group)
        log_sum = sums[0].log()
        ctx.save_for_backward(hidden, weight, places, largest + log_sum)
        ctx.settings = (temperature, num_rows)
        entropy = log_sum - sums[1] / sums[0]
        ctx.mark_non_differentiable(entropy)
        return sums[2] - log_sum, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of this rank's part of the hidden states [n, H], and of its weight [V, H], in their dtype."""
        hidden, weight, places, log_normalizer = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        temperature, num_rows = ctx.settings
        num_tokens, width = hidden.shape
        grad, rows = grad.float().contiguous(), weight[:num_rows]
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if wants_hidden else None
        grad_weight = torch.empty_like(weight) if wants_weight else None
        if grad_weight is not None:
            grad_weight[num_rows if num_tokens else 0 :].zero_()
        columns = gradient_columns(num_tokens, num_rows, hidden.element_size())
        buffer = hidden.new_empty(num_tokens * columns)
        for first in range(0, num_rows if num_tokens else 0, max(columns, 1)):
            part = rows[first : first + columns]
            size = part.shape[0]
            grad_logits = buffer[: num_tokens * size].view(num_tokens, size)
            _gradient_kernel[
                lambda meta, size=size: (triton.cdiv(num_tokens, meta["BLOCK_T"]) * triton.cdiv(size, meta["BLOCK_V"]),)
            ](
                *(hidden, part, places, log_normalizer, grad, grad_logits, num_tokens, size, first),
                *(hidden.stride(0), weight.stride(0), 1.0 / temperature, int(num_tokens <= SMALL)),
                H=width,
            )
            if grad_weight is not None:
                torch.mm(grad_logits.t(), hidden, out=grad_weight[first : first + size])
            if grad_hidden is not None:
                _add_product(grad_hidden, grad_logits, part)
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, None, None, None, None, None


def gradient_columns(num_tokens: int, num_rows: int, element_size: int) -> int:
    """Columns of the buffer in which the gradient of logits is made, for tokens and rows of this rank."""
    fitting = GRADIENT_BYTES // max(1, num_tokens * element_size)
    return min(num_rows, max(GRADIENT_ROWS, fitting // GRADIENT_ROWS * GRADIENT_ROWS))


def _own_sums(
    hidden: Tensor, weight: Tensor, places: Tensor, temperature: float, num_rows: int, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Largest logit m [n], and sums [3, n] of exp(z - m), exp(z - m) * (z - m) and the label's z - m, over the group."""
    num_tokens, width = hidden.shape
    found = hidden.new_empty(4, triton.cdiv(num_rows, SPLIT_ROWS), num_tokens, dtype=torch.float32)
    if num_tokens and num_rows:
        _forward_kernel[lambda meta: (triton.cdiv(num_tokens, meta["BLOCK_T"]) * found.shape[1],)](
            *(hidden, weight, places, found, num_tokens, num_rows),
            *(hidden.stride(0), weight.stride(0), 1.0 / temperature, int(num_tokens <= SMALL)),
            H=width,
            SPLIT=SPLIT_ROWS,
        )
    own, total, weighted, of_label = found
    # A rank may hold padding only: a vocabulary that is small beside its padding.
    largest = own.amax(0) if num_rows else hidden.new_full((num_tokens,), -torch.inf, dtype=torch.float32)
    if group is not None and num_tokens:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    shift = own - largest
    scale = shift.exp()
    is_own = (places >= 0) & (places < num_rows)
    sums = torch.stack(
        [
            (total * scale).sum(0),
            (scale * (weighted + total * shift)).sum(0),
            (of_label.sum(0) - largest).masked_fill(~is_own, 0.0),  # `where` would copy its 0 to the device
        ]
    )
    if group is not None and num_tokens:
        dist.all_reduce(sums, group=group)
    return largest, sums


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to the float32 `total`, without rounding the product to the precision of its factors."""
    if left.dtype is torch.float32:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.float(), right.float())
