"""Triton kernels of `models.fused_logprobs`: products of hidden states and the head whose results never leave the chip whole.

Importing this needs Triton. With TRITON_INTERPRET=1 set before the first import of it they run on CPU tensors (slowly: for tests).

T tokens, H hidden size, V rows of the head on this rank. Offsets are 64-bit: V x H passes 2^31 elements for large models.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

NONE = -1e30
"""Stands for minus infinity: its differences with itself are numbers."""


class Tile(NamedTuple):
    """What one program computes at a time."""

    tokens: int
    rows: int
    depth: int  # of the hidden size, a step of the product
    warps: int
    stages: int


HALF, SINGLE = Tile(128, 256, 64, 8, 3), Tile(64, 64, 32, 4, 2)
"""For bfloat16 the largest tile whose accumulator (128 KiB) fits a Hopper's registers; for float32 a quarter of the operands' bytes."""


@triton.jit
def _logits(
    hidden,
    weight,
    tokens,
    rows,
    num_tokens,
    num_rows,
    width,
    hidden_stride,
    weight_stride,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDENED: tl.constexpr,
):
    """hidden @ weight^T of a tile, float32 [TOKENS, ROWS]."""
    total = tl.zeros((TOKENS, ROWS), dtype=tl.float32)
    h_rows = hidden + tokens.to(tl.int64)[:, None] * hidden_stride
    w_rows = weight + rows.to(tl.int64)[None, :] * weight_stride
    has_token, has_row = (tokens < num_tokens)[:, None], (rows < num_rows)[None, :]
    for start in range(0, width, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        inside = depth < width
        left = tl.load(h_rows + depth[None, :], mask=has_token & inside[None, :], other=0.0)
        right = tl.load(w_rows + depth[:, None], mask=has_row & inside[:, None], other=0.0)
        if WIDENED:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision="ieee")
    return total


@triton.jit
def _sums_kernel(
    hidden,
    weight,
    labels,
    maxima,
    sums,
    products,
    chosen,
    num_tokens,
    num_rows,
    width,
    first_row,
    rows_per_split,
    inverse_temperature,
    hidden_stride,
    weight_stride,
    NOTHING: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDENED: tl.constexpr,
):
    # Programs that run together (neighbours on axis 0) read the same rows of the head: they come from the cache.
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    split = tl.program_id(1)
    is_token = tokens < num_tokens
    places = tl.load(labels + tokens, mask=is_token, other=-1) - first_row
    largest = tl.full((TOKENS,), NOTHING, dtype=tl.float32)
    total = tl.zeros((TOKENS,), dtype=tl.float32)
    product = tl.zeros((TOKENS,), dtype=tl.float32)
    label = tl.zeros((TOKENS,), dtype=tl.float32)
    end = tl.minimum((split + 1) * rows_per_split, num_rows)
    for start in range(split * rows_per_split, end, ROWS):
        rows = start + tl.arange(0, ROWS)
        z = _logits(
            hidden,
            weight,
            tokens,
            rows,
            num_tokens,
            num_rows,
            width,
            hidden_stride,
            weight_stride,
            TOKENS,
            ROWS,
            DEPTH,
            WIDENED,
        )
        z *= inverse_temperature
        is_row = (rows < end)[None, :]
        label += tl.sum(tl.where(is_row & (rows[None, :] == places[:, None]), z, 0.0), axis=1)
        z = tl.where(is_row, z, NOTHING)
        higher = tl.maximum(largest, tl.max(z, axis=1))
        scale = tl.exp(largest - higher)
        shifted = z - higher[:, None]
        exponentials = tl.exp(shifted)
        # sum of exp(z - m) * (z - m) under the new m
        product = scale * (product + total * (largest - higher)) + tl.sum(exponentials * shifted, axis=1)
        total = scale * total + tl.sum(exponentials, axis=1)
        largest = higher
    place = split.to(tl.int64) * num_tokens + tokens
    tl.store(maxima + place, largest, mask=is_token)
    tl.store(sums + place, total, mask=is_token)
    tl.store(products + place, product, mask=is_token)
    tl.store(chosen + place, label, mask=is_token)


@triton.jit
def _gradient_kernel(
    hidden,
    weight,
    labels,
    log_normalizer,
    grad,
    out,
    num_tokens,
    num_rows,
    width,
    first_row,
    first_of_tile,
    rows_of_tile,
    inverse_temperature,
    hidden_stride,
    weight_stride,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDENED: tl.constexpr,
):
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    rows = first_of_tile + columns
    is_token = tokens < num_tokens
    places = tl.load(labels + tokens, mask=is_token, other=-1) - first_row
    normalizer = tl.load(log_normalizer + tokens, mask=is_token, other=0.0)
    scale = tl.load(grad + tokens, mask=is_token, other=0.0) * inverse_temperature
    z = _logits(
        hidden,
        weight,
        tokens,
        rows,
        num_tokens,
        num_rows,
        width,
        hidden_stride,
        weight_stride,
        TOKENS,
        ROWS,
        DEPTH,
        WIDENED,
    )
    probability = tl.exp(z * inverse_temperature - normalizer[:, None])
    target = tl.where(rows[None, :] == places[:, None], 1.0, 0.0)
    value = (target - probability) * scale[:, None]
    inside = is_token[:, None] & (columns < rows_of_tile)[None, :]
    place = tokens.to(tl.int64)[:, None] * rows_of_tile + columns[None, :]
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


class Sums(NamedTuple):
    """Over this rank's rows, float32 [T] each: z are logits over the temperature."""

    largest: Tensor  # m = max z; NONE without a row
    total: Tensor  # sum of exp(z - m)
    product: Tensor  # sum of exp(z - m) * (z - m)
    label: Tensor  # z of the label; 0 where another rank has it


def logit_sums(hidden: Tensor, rows: Tensor, labels: Tensor, first_row: int, temperature: float) -> Sums:
    """What log-probs and entropies are made of, in one pass over the head.

    Args:
        hidden: [T, H], bfloat16 or float32.
        rows: [V, H] of the same dtype.
        labels: int64 [T].
        first_row: of `rows` in the whole vocabulary.
    """
    tile, (num_tokens, width), num_rows = _tile(hidden), hidden.shape, rows.shape[0]
    blocks = triton.cdiv(num_tokens, tile.tokens)
    # The head is split so that there are some programs for each multiprocessor also where tokens are few.
    num_splits = max(1, min(triton.cdiv(num_rows, tile.rows), triton.cdiv(_NUM_PROGRAMS, max(1, blocks))))
    per_split = triton.cdiv(triton.cdiv(num_rows, tile.rows), num_splits) * tile.rows
    parts = [hidden.new_empty((num_splits, num_tokens), dtype=torch.float32) for _ in range(4)]
    _sums_kernel[(blocks, num_splits)](
        hidden,
        rows,
        labels,
        *parts,
        num_tokens,
        num_rows,
        width,
        first_row,
        per_split,
        1.0 / temperature,
        hidden.stride(0),
        rows.stride(0),
        NOTHING=NONE,
        **_launch(tile),
    )
    maxima, sums, products, chosen = parts
    largest = maxima.amax(0)
    total, product = rescaled(maxima, sums, products, largest)
    return Sums(largest, total.sum(0), product.sum(0), chosen.sum(0))


def rescaled(largest: Tensor, total: Tensor, product: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """`total` and `product` of `Sums` as they are under another largest value `new`."""
    scale = (largest - new).exp()
    return scale * total, scale * (product + total * (largest - new))


def logit_gradient(
    hidden: Tensor,
    rows: Tensor,
    labels: Tensor,
    log_normalizer: Tensor,
    grad: Tensor,
    first_row: int,
    temperature: float,
    at: slice,
    out: Tensor,
) -> Tensor:
    """Gradient of the logits of the rows `at`, from that of the log-probs, `grad` float32 [T]: a view [T, rows] of `out`."""
    tile, (num_tokens, width) = _tile(hidden), hidden.shape
    num_rows = at.stop - at.start
    view = out[: num_tokens * num_rows].view(num_tokens, num_rows)
    grid = (triton.cdiv(num_tokens, tile.tokens), triton.cdiv(num_rows, tile.rows))
    _gradient_kernel[grid](
        hidden,
        rows,
        labels,
        log_normalizer,
        grad,
        view,
        num_tokens,
        rows.shape[0],
        width,
        first_row,
        at.start,
        num_rows,
        1.0 / temperature,
        hidden.stride(0),
        rows.stride(0),
        **_launch(tile),
    )
    return view


_NUM_PROGRAMS = 264
"""Wanted of the forward: two for each of a Hopper's 132 multiprocessors."""


def _tile(hidden: Tensor) -> Tile:
    return SINGLE if hidden.dtype is torch.float32 else HALF


def _launch(tile: Tile) -> dict[str, Any]:
    return {
        "TOKENS": tile.tokens,
        "ROWS": tile.rows,
        "DEPTH": tile.depth,
        "WIDENED": triton.knobs.runtime.interpret,  # its numpy knows no bfloat16; products of two are exact in float32
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
