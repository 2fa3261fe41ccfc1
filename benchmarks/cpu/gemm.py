"""How fast this machine multiplies matrices of a model's shapes, and how many operations a model's tokens take."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shape:
    """What of a dense Qwen3-like config.json decides the work."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    groups: int
    dim: int
    vocab: int

    @staticmethod
    def of(config: dict) -> Shape:
        """From config.json."""
        return Shape(
            config["hidden_size"],
            config["intermediate_size"],
            config["num_hidden_layers"],
            config["num_attention_heads"],
            config["num_key_value_heads"],
            config["head_dim"],
            config["vocab_size"],
        )

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of a layer's weights."""
        return [
            (self.hidden, (self.heads + 2 * self.groups) * self.dim),
            (self.heads * self.dim, self.hidden),
            (self.hidden, 2 * self.ffn),
            (self.ffn, self.hidden),
        ]

    def body(self, tokens: float) -> float:
        """Operations of the layers' weights for the forward of so many tokens."""
        return 2.0 * tokens * self.layers * sum(rows * columns for rows, columns in self.matrices)

    def head(self, tokens: float) -> float:
        """Operations of the output layer."""
        return 2.0 * tokens * self.vocab * self.hidden

    def attention(self, pairs: float) -> float:
        """Operations of attention for so many (query token, key token) pairs."""
        return 4.0 * pairs * self.layers * self.heads * self.dim


def gemm_rate(shape: Shape, rows: int, *, backward: bool) -> float:
    """Operations a second (of CPU time, this thread) over a layer's four products, `rows` tokens at once; the best of 5.

    With `backward` also the two products of each weight's gradient step.
    """
    calls = []
    for inputs, outputs in shape.matrices:
        x, weight, grad = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)
        calls.append((x, weight.t()))
        if backward:
            calls += [(grad, weight), (grad.t(), x)]
    work = sum(2.0 * a.shape[0] * a.shape[1] * b.shape[1] for a, b in calls)
    repeats = max(2, int(3e9 / work))
    seconds = []
    for _ in range(5):
        start = time.process_time()
        for _ in range(repeats):
            for a, b in calls:
                torch.mm(a, b)
        seconds.append((time.process_time() - start) / repeats)
    return work / min(seconds)
