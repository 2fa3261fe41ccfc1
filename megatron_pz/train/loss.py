"""What an update minimises: a sum over tokens, to be divided by the step's token count (docs/decisions/0001).

1. A token of weight 0 has no part in loss, gradient or statistics, whatever its numbers are.
2. Log-ratios are clamped before they are exponentiated: one very rare token must not make the loss infinite.
3. A number that is not finite at a trained token shows in the loss, also where the token would have been left out.

Shapes: T packed tokens. Statistics are float64 sums over trained tokens (weight above 0), without gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Nats; exp(20) = 4.9e8 is far outside every clip range and far inside float32."""


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    eps_clip: float,
    eps_clip_high: float,
    dual_clip: float = 0.0,
    importance: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    kl_coef: float = 0.0,
    is_generator: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped objective, negated, and what it did.

    Args:
        log_probs: float32 [T], under the policy that learns; the only argument with a gradient.
        old_log_probs: float32 [T], under the policy that sampled; with `importance` under the policy before the update.
        advantages: float32 [T].
        weights: float32 [T], not negative.
        eps_clip: ratios below 1 - eps_clip earn nothing more where the advantage is negative.
        eps_clip_high: ratios above 1 + eps_clip_high earn nothing more where the advantage is positive (clip-higher).
        dual_clip: where the advantage A is negative the loss is at most -dual_clip * A; above 1, or 0 for off.
        importance: float32 [T] from `importance_weights`, what each token's loss is multiplied by, its KL included: both
            are means over tokens that the engine drew. None: 1.
        ref_log_probs: float32 [T], under the reference policy; None: no KL term.
        kl_coef: weight of the KL to the reference, estimated a token by exp(d) - 1 - d, d = ref_log_probs - log_probs.
        is_generator: bool [T], tokens of mask generation; None: the roles are not told apart.

    Returns:
        (sum of weights * loss, scalar; sums: `ratio`, `clipped` tokens whose gradient the clip took away, `ref_kl`, and the
        loss by role, `loss_mask` and `loss_prediction`).

    Source: paper Eq. 11 by tokens (docs/paper.md 2.7); clip-higher: DAPO; dual clip: Ye et al. 2020; k3: Schulman 2020.
    """
    is_trained = weights > 0
    ratio = (_kept(log_probs - old_log_probs, is_trained)).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    advantages = _kept(advantages, is_trained)
    free = ratio * advantages
    gain = torch.minimum(free, ratio.clamp(1 - eps_clip, 1 + eps_clip_high) * advantages)
    if dual_clip > 0:
        gain = torch.where(advantages < 0, torch.maximum(gain, dual_clip * advantages), gain)
    loss = -gain
    counted = {"ratio": _kept(ratio, is_trained), "clipped": (gain != free) & is_trained}
    if ref_log_probs is not None:
        ref_kl = k3(_kept(ref_log_probs - log_probs, is_trained))
        loss = loss + kl_coef * ref_kl
        counted["ref_kl"] = ref_kl
    if importance is not None:
        loss = loss * _kept(importance, is_trained)
    loss = _kept(weights, is_trained) * loss
    if is_generator is not None:
        counted["loss_mask"] = _kept(loss, is_generator)
        counted["loss_prediction"] = _kept(loss, ~is_generator)
    return loss.sum(), _sums(counted)


def logit_pull(loss: Tensor, log_probs: Tensor, weights: Tensor, is_generator: Tensor) -> dict[str, Tensor]:
    """How hard the loss pulls at the logits of the tokens that were sampled: what each role has in the gradient.

    A token pulls at its own logit with d loss / d log_prob * (1 - p), p its probability: the chain rule through the
    softmax (times 1 / temperature, which is the same for all). This is not the gradient of the weights: how logits
    depend on them is left out, and with it that the pulls of tokens may add up or cancel; so are the other words' logits.
    (In the demo the squared share of mask generation is 0.27 to 0.36 by it and 0.09 to 0.17 in the weights: docs/LOG.md.)
    It costs no second backward. Clipped tokens, and those that the policy is sure of, pull with nothing.

    Args:
        loss: scalar, made of `log_probs`, its graph alive.
        log_probs: float32 [T], what it was made of.
        weights: float32 [T]; 0: not trained.
        is_generator: bool [T].

    Returns:
        Sums of squares, `pull_mask` and `pull_prediction`.
    """
    (slope,) = torch.autograd.grad(loss, log_probs, retain_graph=True)
    pull = _kept(slope * -torch.expm1(log_probs.detach()), weights > 0).double().square()
    return _sums({"pull_mask": _kept(pull, is_generator), "pull_prediction": _kept(pull, ~is_generator)})


def importance_weights(
    old_log_probs: Tensor,
    rollout_log_probs: Tensor,
    weights: Tensor,
    *,
    mode: Literal["truncated", "masked"],
    cap: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """What makes tokens that the engine drew count as if the trainer's policy had drawn them, within bounds.

    The weight is w = exp(old_log_probs - rollout_log_probs), without gradient. `truncated`: min(w, cap). `masked`: w where
    1/cap <= w <= cap, else 0, which leaves the token out. What is left out still counts in the loss's denominator, else
    the other tokens would weigh more.

    With it the clipped ratio of `policy_loss` must be that to the trainer's own log-probs before the update: against the
    engine's, ratio and weight together would count the difference of the two twice.

    Args:
        old_log_probs: float32 [T], of the trainer before the update, under the sampling temperature.
        rollout_log_probs: float32 [T], of the engine, under the same.
        weights: float32 [T], the tokens' loss weights; 0: not trained.
        mode: as above.
        cap: largest weight, above 1.

    Returns:
        (float32 [T], 0 where not trained; sums: `importance_clipped` tokens that were cut or left out).

    Source: TIS: Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training" (2025); MIS: Liu et
    al., "When Speed Kills Stability" (2025); both sides bounded: IcePop (Ling team, 2025).
    """
    is_trained = weights > 0
    log_ratio = _kept(old_log_probs - rollout_log_probs, is_trained).detach()
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if mode == "truncated":
        is_clipped = ratio > cap
        bounded = ratio.clamp(max=cap)
    else:
        is_clipped = (ratio > cap) | (ratio < 1 / cap)  # NaN is neither, and stays
        bounded = ratio.masked_fill(is_clipped, 0.0)
    return _kept(bounded, is_trained), _sums({"importance_clipped": is_clipped & is_trained})


def supervised_loss(log_probs: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood, summed with `weights`; both float32 [T]."""
    return -(weights * _kept(log_probs, weights > 0)).sum(), {}


def k3(log_ratio: Tensor) -> Tensor:
    """exp(d) - 1 - d of d = log(q / p), [...] floating: an estimate of KL(p || q) by samples of p that is never negative."""
    clamped = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(clamped) - clamped


def token_sums(
    log_probs: Tensor, rollout_log_probs: Tensor | None, entropy: Tensor, weights: Tensor, is_generator: Tensor
) -> dict[str, Tensor]:
    """What was trained on, and how far engine and trainer are apart.

    Args:
        log_probs: [T] of the trainer, under the weights that sampled.
        rollout_log_probs: [T] of the engine; None for supervised text.
        entropy: [T], nats.
        weights: [T].
        is_generator: bool [T].

    Returns:
        Sums `tokens`, `packed`, `tokens_mask`, `entropy_mask`, `entropy_prediction` (all that is not mask generation),
        `mismatch_k3`; and `max_mismatch`, no sum but the largest.
    """
    is_trained = weights > 0
    is_mask = is_trained & is_generator
    counted = {
        "tokens": is_trained,
        "tokens_mask": is_mask,
        "entropy_mask": _kept(entropy, is_mask),
        "entropy_prediction": _kept(entropy, is_trained & ~is_generator),
    }
    largest: dict[str, Tensor] = {}
    if rollout_log_probs is not None:
        gap = _kept(log_probs.detach() - rollout_log_probs, is_trained)
        counted["mismatch_k3"] = k3(gap)  # 0 of 0
        largest["max_mismatch"] = gap.abs().max().double()
    # Filled on the device: a tensor made of a Python number is copied there while the host waits.
    packed = torch.full((), float(weights.numel()), dtype=torch.float64, device=weights.device)
    return _sums(counted) | largest | {"packed": packed}


def _kept(values: Tensor, is_trained: Tensor) -> Tensor:
    """`values` where trained, 0 elsewhere; also the gradient, and also where a value is not finite."""
    return values.masked_fill(~is_trained, 0)  # `where` would have to copy its 0 to the device, or fill a tensor


def _sums(counted: dict[str, Tensor]) -> dict[str, Tensor]:
    """float64 sums by name, in one pass over all of them; values [T] each, 0 (or False) where they do not count."""
    rows = torch.stack([values.detach() for values in counted.values()])
    return dict(zip(counted, rows.sum(1, dtype=torch.float64), strict=True))
