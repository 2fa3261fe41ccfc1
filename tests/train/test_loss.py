"""The objective by hand. Ratios are made exact: old log-probs are log_probs - log(ratio)."""

import math

import pytest
import torch

from megatron_pz.train.loss import importance_weights, k3, logit_pull, policy_loss, supervised_loss, token_sums

CLIPS = {"eps_clip": 0.2, "eps_clip_high": 0.28}


def tensor(*values):
    return torch.tensor(values, dtype=torch.float32)


def loss_of(ratios, advantages, weights=None, **settings):
    """(loss, gradient by log-prob, statistics) of tokens with these ratios."""
    log_probs = torch.full((len(ratios),), -1.0, requires_grad=True)
    old = -1.0 - tensor(*ratios).log()
    weights = tensor(*(weights or [1.0] * len(ratios)))
    loss, stats = policy_loss(log_probs, old, tensor(*advantages), weights, **{**CLIPS, **settings})
    loss.backward()
    return loss.item(), log_probs.grad.tolist(), {name: value.item() for name, value in stats.items()}


def test_without_clipping_the_loss_is_minus_ratio_times_advantage():
    loss, grad, stats = loss_of([1.0, 1.1, 0.9], [2.0, 1.0, -1.0])
    assert loss == pytest.approx(-(2.0 + 1.1 - 0.9), rel=1e-6)
    assert grad == pytest.approx([-2.0, -1.1, 0.9], rel=1e-6)
    assert stats == {"ratio": pytest.approx(3.0), "clipped": 0}


def test_the_upper_clip_is_higher_than_the_lower_one():
    # 1.25 is inside 1.28, 1.5 is cut to 1.28 and 0.5 (negative advantage) to 0.8; clipped tokens have no gradient.
    loss, grad, stats = loss_of([1.25, 1.5, 0.5], [1.0, 1.0, -1.0])
    assert loss == pytest.approx(-1.25 - 1.28 + 0.8, rel=1e-6)
    assert grad == pytest.approx([-1.25, 0, 0], rel=1e-6)
    assert stats["clipped"] == 2


def test_the_clip_does_not_protect_against_what_is_worse():
    # Already too likely though bad, already too unlikely though good: the gradient stays whole.
    loss, grad, stats = loss_of([1.5, 0.5], [-1.0, 1.0])
    assert loss == pytest.approx(1.5 - 0.5, rel=1e-6)
    assert grad == pytest.approx([1.5, -0.5], rel=1e-6)
    assert stats["clipped"] == 0


def test_dual_clip_bounds_the_loss_of_a_bad_token():
    loss, grad, stats = loss_of([20.0, 20.0, 2.0], [-1.0, 1.0, -1.0], dual_clip=10.0)
    assert loss == pytest.approx(10.0 - 1.28 + 2.0, rel=1e-6)
    assert grad == pytest.approx([0, 0, 2.0], rel=1e-6)
    assert stats["clipped"] == 2
    assert loss_of([20.0], [-1.0])[0] == pytest.approx(20.0, rel=1e-6)


def test_weights_scale_tokens_and_zero_takes_them_out():
    loss, grad, stats = loss_of([1.0, 1.0, 5.0], [1.0, 1.0, 1.0], weights=[0.5, 2.0, 0.0])
    assert loss == pytest.approx(-2.5)
    assert grad == pytest.approx([-0.5, -2.0, 0])
    assert stats == {"ratio": pytest.approx(2.0), "clipped": 0}


def test_the_kl_to_the_reference_by_hand():
    log_probs = tensor(-1.0, -1.0).requires_grad_()
    reference = tensor(-1.0 + math.log(2), -1.0)  # d = log 2: k3 = 2 - 1 - log 2
    loss, stats = policy_loss(
        log_probs, log_probs.detach(), tensor(0, 0), tensor(1, 1), **CLIPS, ref_log_probs=reference, kl_coef=0.5
    )
    loss.backward()
    assert stats["ref_kl"].item() == pytest.approx(1 - math.log(2), rel=1e-6)
    assert loss.item() == pytest.approx(0.5 * (1 - math.log(2)), rel=1e-6)
    assert log_probs.grad.tolist() == pytest.approx([0.5 * (1 - 2.0), 0])  # d/dlog_prob of k3 = 1 - exp(d)


def test_k3_is_never_negative_and_its_mean_is_the_kl():
    p, q = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64), torch.tensor([0.5, 0.1, 0.4], dtype=torch.float64)
    estimates = k3((q / p).log())
    assert (estimates >= 0).all()
    assert (p * estimates).sum().item() == pytest.approx((p * (p / q).log()).sum().item(), abs=1e-12)


def importance_of(ratios, mode, weights=None):
    """(weights, clipped) of tokens with these ratios, trainer to engine; cap 2."""
    engine = torch.full((len(ratios),), -3.0)
    weights = tensor(*(weights or [1.0] * len(ratios)))
    found, stats = importance_weights(engine + tensor(*ratios).log(), engine, weights, mode=mode, cap=2.0)
    return found.tolist(), stats["importance_clipped"].item()


def test_truncated_weights_are_cut_at_the_cap_and_masked_ones_left_out_beyond_it_or_its_reciprocal():
    ratios = [1.0, 1.9, 3.0, 0.6, 0.4]
    assert importance_of(ratios, "truncated") == (pytest.approx([1.0, 1.9, 2.0, 0.6, 0.4]), 1)
    assert importance_of(ratios, "masked") == (pytest.approx([1.0, 1.9, 0.0, 0.6, 0.0]), 2)


def test_a_token_that_is_not_trained_has_no_importance_and_is_not_counted():
    assert importance_of([3.0, math.nan, 1.5], "masked", weights=[0.0, 0.0, 0.5]) == (pytest.approx([0, 0, 1.5]), 0)
    assert importance_of([3.0, 3.0, 1.5], "truncated", weights=[0.0, 2.0, 0.5]) == (pytest.approx([0, 2.0, 1.5]), 1)


def test_an_importance_scales_a_token_s_clipped_loss_and_its_kl_but_no_statistics():
    # Ratio, advantage, importance: 1.5 is clipped to 1.28 first; the third token is left out.
    loss, grad, stats = loss_of([1.0, 1.5, 1.1], [2.0, 1.0, 5.0], importance=tensor(1.5, 0.5, 0.0))
    assert loss == pytest.approx(-(1.5 * 2.0 + 0.5 * 1.28), rel=1e-6)
    assert grad == pytest.approx([-3.0, 0, 0], rel=1e-6)
    assert stats == {"ratio": pytest.approx(3.6), "clipped": 1}
    kl = {"ref_log_probs": torch.full((1,), -1.0 + math.log(2)), "kl_coef": 0.5}
    loss, grad, stats = loss_of([1.0], [2.0], importance=tensor(1.5), **kl)
    assert loss == pytest.approx(1.5 * (-2.0 + 0.5 * (1 - math.log(2))), rel=1e-6)
    assert grad == pytest.approx([1.5 * (-2.0 - 0.5)], rel=1e-6)
    assert stats["ref_kl"] == pytest.approx(1 - math.log(2), rel=1e-6)


def test_importance_has_no_gradient():
    log_probs = tensor(-1.0).requires_grad_()
    importance, _ = importance_weights(log_probs, tensor(-1.2), tensor(1.0), mode="truncated", cap=2.0)
    assert not importance.requires_grad


@pytest.mark.parametrize("mode", ["truncated", "masked"])
def test_a_log_prob_that_is_not_a_number_shows_and_an_endless_one_weighs_no_more_than_the_cap(mode):
    old, engine = tensor(math.nan, math.inf), tensor(-1.0, -1.0)
    importance, stats = importance_weights(old, engine, tensor(1.0, 1.0), mode=mode, cap=2.0)
    assert math.isnan(importance[0].item())
    assert importance[1].item() == (2.0 if mode == "truncated" else 0.0)
    assert stats["importance_clipped"].item() == 1


def test_a_huge_ratio_stays_finite_and_has_no_gradient():
    log_probs = tensor(-1.0, -300.0).requires_grad_()
    loss, _ = policy_loss(log_probs, tensor(-300.0, -1.0), tensor(-1.0, -1.0), tensor(1, 1), **CLIPS)
    loss.backward()
    assert torch.isfinite(loss)
    assert loss.item() == pytest.approx(math.exp(20) + 0.8, rel=1e-6)
    assert log_probs.grad.tolist() == [0, 0]


def test_what_is_not_trained_may_be_anything():
    log_probs = tensor(-1.0, math.nan, -math.inf).requires_grad_()
    old, advantages, weights = tensor(-1.0, -1.0, math.nan), tensor(2.0, math.inf, 1.0), tensor(1, 0, 0)
    loss, stats = policy_loss(log_probs, old, advantages, weights, **CLIPS, ref_log_probs=old, kl_coef=1.0)
    loss.backward()
    assert loss.item() == -2.0
    assert log_probs.grad.tolist() == [-2.0, 0, 0]
    assert all(math.isfinite(value) for value in stats.values())


def test_what_is_trained_and_not_finite_shows():
    loss, _ = policy_loss(tensor(math.nan), tensor(-1.0), tensor(1.0), tensor(1.0), **CLIPS)
    assert math.isnan(loss.item())


def test_the_loss_by_role_adds_up_to_the_loss():
    is_generator = torch.tensor([True, False, False, True])
    given = (tensor(-1.0, -1.0, -1.0, -1.0), tensor(-1.0, -1.0, -1.0, -1.0), tensor(2.0, -1.0, 0.5, 9.0))
    loss, stats = policy_loss(*given, tensor(0.5, 1.0, 2.0, 0.0), is_generator=is_generator, **CLIPS)
    assert (stats["loss_mask"].item(), stats["loss_prediction"].item()) == (-1.0, 1.0 - 1.0)
    assert loss.item() == -1.0
    assert not {"loss_mask", "loss_prediction"} & set(policy_loss(*given, tensor(1.0, 1.0, 1.0, 1.0), **CLIPS)[1])


def test_a_token_pulls_at_its_logit_as_backward_through_the_softmax_does():
    logits = torch.tensor(
        [[2.0, 0.0, -1.0], [0.5, 0.5, 0.0], [9.0, 0.0, 0.0], [0.0, 1.0, math.nan]], requires_grad=True
    )
    chosen, is_generator = torch.tensor([0, 2, 0, 1]), torch.tensor([True, False, False, False])
    weights, advantages = tensor(0.5, 1.0, 1.0, 0.0), tensor(2.0, -1.0, 1.0, 1.0)
    log_probs = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0]
    loss, _ = policy_loss(log_probs, log_probs.detach(), advantages, weights, **CLIPS)
    pulls = logit_pull(loss, log_probs, weights, is_generator)
    loss.backward()  # the graph is still there
    own = logits.grad.gather(1, chosen[:, None])[:3, 0].double().square()
    assert pulls["pull_mask"].item() == pytest.approx(own[0].item(), rel=1e-5)
    assert pulls["pull_prediction"].item() == pytest.approx((own[1] + own[2]).item(), rel=1e-5)
    assert own[2] < 1e-6 < own[1]  # sure of it: hardly any pull


def test_clipped_tokens_pull_with_nothing():
    log_probs = torch.full((2,), -1.0, requires_grad=True)
    weights, roles = tensor(1.0, 1.0), torch.tensor([True, False])
    loss, _ = policy_loss(log_probs, tensor(-2.0, -1.0), tensor(1.0, 1.0), weights, **CLIPS)
    pulls = logit_pull(loss, log_probs, weights, roles)
    assert pulls["pull_mask"] == 0 and pulls["pull_prediction"] > 0


def test_the_supervised_loss_is_the_negative_log_likelihood():
    log_probs = tensor(-1.0, -3.0, math.nan).requires_grad_()
    loss, _ = supervised_loss(log_probs, tensor(1.0, 0.5, 0.0))
    loss.backward()
    assert loss.item() == pytest.approx(2.5)
    assert log_probs.grad.tolist() == [-1.0, -0.5, 0]


def test_sums_by_role_and_the_mismatch_of_the_engine_by_hand():
    sums = token_sums(
        log_probs=tensor(-1.0, -2.0, -0.5, -9.0),
        rollout_log_probs=tensor(-1.0 - math.log(2), -2.0, -0.5, -1.0),
        entropy=tensor(0.5, 1.0, 2.0, 7.0),
        weights=tensor(1.0, 3.0, 1.0, 0.0),
        is_generator=torch.tensor([True, False, False, True]),
    )
    assert {name: value.item() for name, value in sums.items()} == {
        "tokens": 3,
        "packed": 4,
        "tokens_mask": 1,
        "entropy_mask": 0.5,
        "entropy_prediction": 3.0,
        "mismatch_k3": pytest.approx(2 - 1 - math.log(2), rel=1e-6),
        "max_mismatch": pytest.approx(math.log(2), rel=1e-6),
    }
