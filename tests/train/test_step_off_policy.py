"""Updates whose samples come from another policy than the trainer's: an engine that computes otherwise, weights that have moved
on, experts that a server chose; and the distance to the reference. In one process, on a tiny Qwen3."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_trainer import MOE, SAMPLES, log_probs_of, scored, weights

from megatron_pz.batch.schedule import plan_update
from megatron_pz.report.metrics import check
from megatron_pz.train.learn import Learner
from megatron_pz.train.loss import k3


def test_where_the_engine_agrees_there_is_no_mismatch_and_the_loss_is_minus_the_mean_advantage(trainer):
    one = trainer()
    result = one.step(plan_update(scored(one, SAMPLES), max_tokens=64), lr_step=1)
    assert result.metrics["mismatch/max_abs"] < 1e-5
    assert result.metrics["mismatch_kl"] < 1e-9
    assert result.metrics["ratio/mean"] == pytest.approx(1, abs=1e-5)
    assert result.metrics["clip_fraction"] == 0
    assert result.loss == pytest.approx(-(2 * 1.0 + 3 * -0.5 + 2 * 0.5) / 7, abs=1e-5)


def test_an_engine_that_is_off_by_a_known_amount_shows_as_that_mismatch(trainer):
    one = trainer()
    off = [replace(s, rollout_log_probs=tuple(p + 0.4 for p in s.rollout_log_probs)) for s in scored(one, SAMPLES)]
    metrics = one.step(plan_update(off, max_tokens=64), lr_step=1).metrics
    assert metrics["mismatch_kl"] == pytest.approx(k3(torch.tensor(-0.4)).item(), rel=1e-4)
    assert metrics["mismatch/max_abs"] == pytest.approx(0.4, rel=1e-4)
    assert metrics["ratio/mean"] == pytest.approx(math.exp(-0.4), rel=1e-4)
    assert metrics["clip_fraction"] == pytest.approx(3 / 7)  # ratio 0.67: below 0.8 where the advantage is negative


def test_given_old_log_probs_the_ratio_is_to_them_and_the_mismatch_theirs_to_the_engine(trainer):
    one = trainer()
    plan = plan_update(scored(one, SAMPLES), max_tokens=64)
    old = [values - 0.1 for values in one.score(plan.micro_batches[0])]
    metrics = one.step(plan, lr_step=1, old_log_probs=old).metrics
    assert metrics["ratio/mean"] == pytest.approx(math.exp(0.1), rel=1e-4)
    assert metrics["mismatch/max_abs"] == pytest.approx(0.1, rel=1e-3)


def off_by(trainer, *nats):
    """The samples, sample i told by an engine whose log-probs are `nats[i]` below the trainer's."""
    return [
        replace(s, rollout_log_probs=tuple(p - gap for p in s.rollout_log_probs))
        for s, gap in zip(scored(trainer, SAMPLES), nats, strict=True)
    ]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("mode", "weights"), [("truncated", (1.25, 2.0, 0.4)), ("masked", (1.25, 0.0, 0.0))])
def test_importance_weighs_each_token_by_trainer_to_engine_and_the_ratio_is_to_the_trainer(
    trainer, mode, weights, temperature
):
    one = trainer(importance_sampling=mode, importance_cap=2.0, temperature=temperature, clip_grad=0.0)
    samples = off_by(one, math.log(1.25), math.log(3.0), math.log(0.4))
    losses = []
    for s, weight in zip(samples, weights, strict=True):
        new = log_probs_of(one, s.token_ids, temperature, grad=True)[np.array(s.loss_weights[1:]) > 0]
        losses.append(-weight * s.advantage * (new - new.detach()).exp())
    wanted = torch.cat(losses).sum() / 7  # also of the tokens that are left out
    grads = torch.autograd.grad(wanted, list(one.chunks[0].parameters()))

    result = one.step(plan_update(samples, max_tokens=8), lr_step=1)

    assert result.loss == pytest.approx(
        -(2 * weights[0] * 1.0 - 3 * weights[1] * 0.5 + 2 * weights[2] * 0.5) / 7, rel=1e-4
    )
    for parameter, grad in zip(one.chunks[0].parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.main_grad, grad, rtol=1e-4, atol=1e-5 * grad.abs().max().item())
    assert result.metrics["mismatch/clipped_share"] == pytest.approx(3 / 7 if mode == "truncated" else 5 / 7)
    assert result.metrics["mismatch/max_abs"] == pytest.approx(math.log(3), rel=1e-4)
    assert (result.metrics["ratio/mean"], result.metrics["clip_fraction"]) == (1, 0)


def test_in_the_first_update_scored_log_probs_and_the_update_s_own_give_the_same(trainer):
    one, other = (trainer(importance_sampling="truncated", clip_grad=0.0) for _ in range(2))
    plan = plan_update(off_by(one, 0.1, 0.9, -0.2), max_tokens=64)
    by_itself = one.step(plan, lr_step=1)
    by_score = other.step(plan, lr_step=1, old_log_probs=other.score(plan.micro_batches[0]))
    assert by_score.metrics == pytest.approx(dict(by_itself.metrics), rel=1e-6)
    assert all(torch.equal(value, weights(other)[name]) for name, value in weights(one).items())


def test_in_later_updates_of_a_batch_importance_stays_that_of_the_policy_before_the_first(trainer, tmp_path):
    one = trainer(importance_sampling="truncated", updates_per_batch=2)
    samples = off_by(one, math.log(1.5), math.log(1.5), math.log(3.0))
    plans = [plan_update(samples[:1], max_tokens=64), plan_update(samples[1:], max_tokens=64)]
    metrics = Learner(one, one.config.train, tmp_path, rank=0).learn(plans, step=1).metrics
    assert metrics["mismatch/clipped_share"] == pytest.approx((0 + 2 / 5) / 2)
    assert metrics["mismatch/max_abs"] == pytest.approx((math.log(1.5) + math.log(3.0)) / 2, rel=1e-4)
    assert metrics["ratio/mean"] != pytest.approx(1, abs=1e-4)  # moved by the first update


def routed(samples):
    """All but the last sample with experts drawn by lot."""
    rng = np.random.default_rng(0)

    def experts(num_tokens):
        return rng.random((num_tokens - 1, 2, 8)).argsort(-1)[..., :2].astype(np.int16)

    return [*(replace(s, routed_experts=experts(len(s.token_ids))) for s in samples[:-1]), samples[-1]]


def test_with_routing_replay_scores_and_updates_follow_the_server_s_experts_and_tell_for_how_many_tokens(trainer):
    one = trainer(hf_config=MOE, routing_replay=True)
    plan = plan_update(routed(SAMPLES), max_tokens=64)
    (batch,) = plan.micro_batches[0]
    (own,), (replayed,) = one.score([batch], replays_routing=False), one.score([batch])
    at = list(zip(batch.cu_seqlens, batch.cu_seqlens[1:], batch.sample_indices, strict=False))
    for start, end, index in at:
        wanted = log_probs_of(one, SAMPLES[index].token_ids).numpy() * (np.array(SAMPLES[index].loss_weights[1:]) > 0)
        np.testing.assert_allclose(own[start : end - 1], wanted, atol=2e-6)
        if index == 2:  # no server has told its experts
            np.testing.assert_allclose(replayed[start:end], own[start:end], atol=2e-6)
        else:
            assert np.abs(replayed[start:end] - own[start:end]).max() > 1e-3
    as_replayed = replace(batch, rollout_log_probs=replayed)
    metrics = one.step(replace(plan, micro_batches=((as_replayed,),)), lr_step=1).metrics
    assert metrics["mismatch/max_abs"] < 1e-5
    assert metrics["mismatch/replayed_share"] == pytest.approx(5 / 7)
    check(metrics)


def test_without_routing_replay_the_experts_of_a_micro_batch_are_not_looked_at(trainer):
    with_them, without = (trainer(hf_config=MOE) for _ in range(2))
    samples = scored(without, SAMPLES)
    found = [
        one.step(plan_update(given, max_tokens=64), lr_step=1)
        for one, given in ((with_them, routed(samples)), (without, samples))
    ]
    assert found[0] == found[1]


def test_the_reference_goes_by_its_own_routing(trainer, tmp_path):
    one = trainer(hf_config=MOE, routing_replay=True, kl_coef=0.1)
    plan = plan_update(routed(SAMPLES), max_tokens=64)
    learner = Learner(one, one.config.train, tmp_path, rank=0)
    own, replayed = one.score(plan.micro_batches[0], replays_routing=False), one.score(plan.micro_batches[0])
    distances = [
        k3(torch.tensor(o - r, dtype=torch.float64))[b.loss_weights > 0].sum().item()
        for o, r, b in zip(own, replayed, plan.micro_batches[0], strict=True)
    ]
    assert learner.learn([plan], step=1).metrics["ref_kl"] == pytest.approx(sum(distances) / 7, rel=1e-4)


def test_the_kl_to_the_reference_pulls_and_is_reported(trainer):
    free, held = trainer(), trainer(kl_coef=2.0)
    plan = plan_update(scored(free, SAMPLES), max_tokens=64)
    reference = [values - 0.5 for values in held.score(plan.micro_batches[0])]
    result = held.step(plan, lr_step=1, ref_log_probs=reference)
    distance = k3(torch.tensor(-0.5)).item()
    assert result.metrics["ref_kl"] == pytest.approx(distance, rel=1e-4)
    assert result.loss - free.step(plan, lr_step=1).loss == pytest.approx(2.0 * distance, rel=1e-3)


def test_several_updates_of_a_batch_report_what_each_of_them_has(trainer, tmp_path):
    one = trainer(updates_per_batch=2)
    samples = scored(one, SAMPLES)
    plans = [plan_update(samples[:1], max_tokens=64), plan_update(samples[1:], max_tokens=64)]
    result = Learner(one, one.config.train, tmp_path, rank=0).learn(plans, step=1)
    assert result.metrics["entropy/mask"] > 0  # of the first only
    assert result.metrics["entropy/prediction"] > 0  # of the second only
    assert result.metrics["tokens/trained"] == (2 + 5) / 2
    # Both are scored before the first update: engine and trainer have the same weights there.
    assert result.metrics["mismatch/max_abs"] < 1e-5
    assert result.metrics["ratio/mean"] != pytest.approx(1, abs=1e-4)
