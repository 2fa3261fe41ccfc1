"""From logits to tokens: one uniform number a token, from the request's own stream, through the inverse of the CDF.

1. A row's token depends on its logits, its params and its uniform, not on the other rows.
2. Log-probs are taken after temperature and before top-k and top-p, over the whole vocabulary: what a trainer that
   scales by the same temperature computes.

Shapes: n rows, V vocabulary (without padding).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_pz.errors import EngineError
from megatron_pz.types import SamplingParams


def uniforms(seed: int) -> Iterator[float]:
    """The stream of a request: endless float64 numbers in [0, 1), a function of `seed` alone."""
    generator = np.random.Generator(np.random.Philox(key=seed % 2**128))
    while True:
        yield from generator.random(32).tolist()


@dataclass(frozen=True)
class RowParams:
    """Sampling params of n rows, as tensors. `None` where no row needs the field."""

    temperature: Tensor | None  # float32 [n, 1]; greedy rows have 1
    greedy: Tensor | None  # bool [n]
    restricted: Tensor | None  # int64 [restricted rows], those with a top-k or top-p
    top_k: Tensor | None  # int64 [restricted rows, 1], V where off
    top_p: Tensor | None  # float32 [restricted rows, 1]
    all_greedy: bool

    @classmethod
    def of(cls, params: Sequence[SamplingParams], vocab_size: int, device: torch.device) -> RowParams:
        """Params of the rows, in row order."""
        temperatures = [p.temperature or 1.0 for p in params]
        greedy = [p.temperature == 0 for p in params]
        rows = [row for row, p in enumerate(params) if (p.top_p < 1 or p.top_k) and p.temperature]
        return cls(
            temperature=torch.tensor(temperatures, device=device)[:, None] if set(temperatures) != {1.0} else None,
            greedy=torch.tensor(greedy, device=device) if any(greedy) else None,
            restricted=torch.tensor(rows, device=device) if rows else None,
            top_k=torch.tensor([params[r].top_k or vocab_size for r in rows], device=device)[:, None] if rows else None,
            top_p=torch.tensor([params[r].top_p for r in rows], device=device)[:, None] if rows else None,
            all_greedy=all(greedy),
        )


def restrict(probs: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """`probs`, float32 [n, V], with zeros outside the kept set; not renormalised.

    Kept are the `top_k` [n, 1] likeliest tokens, and of these the fewest whose share reaches `top_p` [n, 1]; at least
    one token. Among equals the lower id goes first.
    """
    ordered, ids = probs.sort(dim=-1, descending=True, stable=True)
    ordered = ordered * (torch.arange(probs.shape[-1], device=probs.device) < top_k)
    before = ordered.cumsum(-1) - ordered
    kept = (before < top_p * ordered.sum(-1, keepdim=True)) & (ordered > 0)
    kept[:, 0] = True
    return torch.zeros_like(probs).scatter_(-1, ids, ordered * kept)


def sample(logits: Tensor, params: RowParams, draws: Sequence[float]) -> tuple[list[int], list[float]]:
    """One token a row, with its log-probability.

    Args:
        logits: [n, V] of the real vocabulary, any floating dtype.
        params: of the n rows.
        draws: n uniforms in [0, 1).

    Returns:
        Token ids and natural log-probabilities (float32), n each.

    Raises:
        EngineError: logits are not finite.
    """
    logits = logits.float()
    scaled = logits if params.temperature is None else logits / params.temperature
    log_probs = scaled.log_softmax(-1)
    if params.all_greedy:
        tokens = logits.argmax(-1)
    else:
        probs = log_probs.exp()
        if params.restricted is not None and params.top_k is not None and params.top_p is not None:
            rows = params.restricted
            probs[rows] = restrict(probs[rows], params.top_k, params.top_p)
        tokens = _inverse_cdf(probs, torch.tensor(draws, dtype=torch.float32, device=logits.device))
        if params.greedy is not None:
            tokens = torch.where(params.greedy, logits.argmax(-1), tokens)
    chosen = log_probs.gather(-1, tokens[:, None])[:, 0].tolist()
    if not np.isfinite(chosen).all():
        raise EngineError(
            "The model's logits are not finite, so no token can be sampled; its weights are damaged. "
            "Go back to an earlier checkpoint."
        )
    return tokens.tolist(), chosen


def _inverse_cdf(probs: Tensor, draws: Tensor) -> Tensor:
    """For each row the first token at which the cumulated `probs` [n, V] exceed its draw's share of their sum.

    A token of probability 0 is never chosen: the CDF does not rise there.
    """
    cdf = probs.cumsum(-1)
    total = cdf[:, -1]
    # A draw just under 1 may round up to the whole sum, beyond which there is no token.
    target = torch.minimum(draws * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, target[:, None], right=True)[:, 0].clamp_(max=probs.shape[-1] - 1)
