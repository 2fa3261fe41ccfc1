"""Scores and updates in one process, on a tiny Qwen3. Samples of another policy: test_step_off_policy.py. Layouts: test_layouts.py."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import sample
from small_trainer import AS_TEXT, MOE, PLATFORM, SAMPLES, log_probs_of, logits_of, scored, weights

from megatron_pz.batch.schedule import plan_update
from megatron_pz.config.schema import ModelConfig
from megatron_pz.errors import LayoutError, NumericsError
from megatron_pz.report.metrics import check
from megatron_pz.train.step import Trainer
from megatron_pz.types import Role, UpdatePlan


def test_experts_under_tensor_parallelism_alone_are_refused_before_a_step(parallel, trainer):
    one = trainer(hf_config=MOE)
    with pytest.raises(LayoutError, match=r"size is 2 and sequence_parallel false.*Set it to true"):
        Trainer(one.chunks, one.config, PLATFORM, replace(parallel, tp_size=2))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_are_the_log_probs_of_the_trained_tokens_under_the_sampling_temperature(trainer, temperature):
    one = trainer(temperature=temperature)
    plan = plan_update(SAMPLES, max_tokens=64)
    (batch,) = plan.micro_batches[0]
    (scores,) = one.score([batch])
    for start, end, index in zip(batch.cu_seqlens, batch.cu_seqlens[1:], batch.sample_indices, strict=False):
        wanted = log_probs_of(one, SAMPLES[index].token_ids, temperature).numpy()
        wanted = wanted * (np.array(SAMPLES[index].loss_weights[1:]) > 0)
        np.testing.assert_allclose(scores[start : end - 1], wanted, atol=2e-6)
        assert scores[end - 1] == 0


def test_text_is_learned_at_temperature_one_and_its_loss_is_the_mean_cross_entropy(trainer):
    one = trainer(task="sft", temperature=0.5)
    wanted = -sum(float((log_probs_of(one, s.token_ids) * torch.tensor(s.loss_weights[1:])).sum()) for s in AS_TEXT)
    result = one.step(plan_update(AS_TEXT, max_tokens=8), lr_step=1)
    assert result.loss == pytest.approx(wanted / 7, rel=1e-5)
    assert result.metrics["tokens/trained"] == 7
    assert set(result.metrics) == {"loss", "grad_norm", "lr", "entropy", "tokens/trained", "tokens/packed"}


@pytest.mark.parametrize("mean", ["token_mean", "sequence_mean"])
def test_gradients_are_those_of_the_formula_written_out(trainer, mean):
    one = trainer(clip_grad=0.0)
    samples = [replace(s, rollout_log_probs=tuple(p - 0.05 for p in s.rollout_log_probs)) for s in scored(one, SAMPLES)]
    losses = []  # paper Eq. 11 a token; no ratio of exp(0.05) is clipped
    for s in samples:
        trained = np.array(s.loss_weights[1:]) > 0
        new = log_probs_of(one, s.token_ids, grad=True)[trained]
        losses.append(-(new - torch.tensor(s.rollout_log_probs[1:])[trained]).exp() * s.advantage)
    wanted = torch.cat(losses).mean() if mean == "token_mean" else torch.stack([x.mean() for x in losses]).mean()
    parameters = list(one.chunks[0].parameters())
    grads = torch.autograd.grad(wanted, parameters)

    result = one.step(plan_update(samples, max_tokens=8, loss_aggregation=mean), lr_step=1)

    assert result.loss == pytest.approx(wanted.item(), rel=1e-5)
    for parameter, grad in zip(parameters, grads, strict=True):
        torch.testing.assert_close(parameter.main_grad, grad, rtol=1e-4, atol=1e-6 * grad.abs().max().item())


def test_the_entropy_is_that_of_the_role_s_trained_tokens(trainer):
    one = trainer()
    result = one.step(plan_update(SAMPLES, max_tokens=64), lr_step=1)

    def entropy(s):
        fresh = logits_of(trainer(), s.token_ids)[:-1]
        return torch.distributions.Categorical(logits=fresh).entropy()[torch.tensor(s.loss_weights[1:]) > 0]

    assert result.metrics["entropy/mask"] == pytest.approx(entropy(SAMPLES[0]).mean().item(), rel=1e-5)
    predictions = torch.cat([entropy(s) for s in SAMPLES[1:]])
    assert result.metrics["entropy/prediction"] == pytest.approx(predictions.mean().item(), rel=1e-5)
    assert result.metrics["token_share/mask"] == pytest.approx(2 / 7)


def test_loss_and_gradient_by_role_are_those_of_the_formula(trainer):
    one = trainer(temperature=0.7)
    samples = scored(one, SAMPLES)
    losses, pulls = {}, {}
    for s in samples:
        trained = np.array(s.loss_weights[1:]) > 0
        logits = logits_of(one, s.token_ids).detach().requires_grad_()
        log_probs = (logits[:-1] / 0.7).log_softmax(-1).gather(1, torch.tensor(s.token_ids[1:])[:, None])[:, 0][trained]
        loss = -((log_probs - log_probs.detach()).exp() * s.advantage).sum()
        (grad,) = torch.autograd.grad(loss, logits)
        own = grad[:-1].gather(1, torch.tensor(s.token_ids[1:])[:, None]).square().sum().item()
        losses[s.role], pulls[s.role] = losses.get(s.role, 0) + loss.item(), pulls.get(s.role, 0) + own
    metrics = one.step(plan_update(samples, max_tokens=8), lr_step=1).metrics
    assert metrics["loss/mask"] == pytest.approx(losses[Role.GENERATOR] / 7, rel=1e-4)
    assert metrics["loss/prediction"] == pytest.approx(losses[Role.PREDICTOR] / 7, rel=1e-4)
    assert metrics["loss/mask"] + metrics["loss/prediction"] == pytest.approx(metrics["loss"], abs=1e-6)
    assert metrics["grad_share/mask"] == pytest.approx(pulls[Role.GENERATOR] / sum(pulls.values()), rel=1e-4)


def test_of_a_role_without_tokens_there_is_no_loss_and_no_share_of_the_gradient(trainer):
    metrics = (
        trainer().step(plan_update([s for s in SAMPLES if s.role is Role.PREDICTOR], max_tokens=64), lr_step=1).metrics
    )
    assert "loss/prediction" in metrics and not {"loss/mask", "grad_share/mask"} & set(metrics)


def test_an_update_makes_good_tokens_likelier_and_bad_ones_less_likely(trainer):
    one = trainer(lr=1e-3)
    samples = scored(one, SAMPLES)
    before = [log_probs_of(one, s.token_ids)[np.array(s.loss_weights[1:]) > 0].sum() for s in samples]
    one.step(plan_update(samples, max_tokens=64), lr_step=1)
    after = [log_probs_of(one, s.token_ids)[np.array(s.loss_weights[1:]) > 0].sum() for s in samples]
    assert after[0] > before[0]
    assert after[1] < before[1]


def test_text_is_learned_by_heart(trainer):
    one = trainer(task="continue_pt")
    plan = plan_update(AS_TEXT, max_tokens=64)
    losses = [one.step(plan, lr_step=step).loss for step in range(1, 31)]
    assert losses[0] > 3
    assert losses[-1] < 0.1


def test_bfloat16_learns_with_float32_masters(trainer):
    one = trainer(model=ModelConfig(init="random", params_dtype="bfloat16"), task="continue_pt")
    assert {value.dtype for value in one.chunks[0].parameters()} == {torch.bfloat16}
    plan = plan_update(AS_TEXT, max_tokens=64)
    losses = [one.step(plan, lr_step=step).loss for step in range(1, 31)]
    assert losses[0] == pytest.approx(trainer(task="continue_pt").step(plan, lr_step=1).loss, rel=0.02)
    assert losses[-1] < 0.1


def test_the_gradient_norm_is_reported_before_clipping(trainer):
    plan = plan_update(AS_TEXT, max_tokens=64)
    loose, tight = trainer(task="sft", clip_grad=0.0), trainer(task="sft", clip_grad=1e-3)
    wanted = loose.step(plan, lr_step=1).grad_norm
    assert wanted > 0.1
    assert tight.step(plan, lr_step=1).grad_norm == pytest.approx(wanted, rel=1e-6)
    norms = [value.main_grad.norm().item() for value in loose.chunks[0].parameters()]
    assert math.hypot(*norms) == pytest.approx(wanted, rel=1e-5)
    clipped = [value.main_grad.norm().item() for value in tight.chunks[0].parameters()]
    assert math.hypot(*clipped) == pytest.approx(1e-3, rel=1e-3)


def test_norms_do_not_decay(trainer):
    one = trainer(weight_decay=0.1)
    one.step(plan_update(SAMPLES, max_tokens=64), lr_step=1)
    decays = {group["weight_decay"] for group in one.optimizer.param_groups if group["params"]}
    assert decays == {0.0, 0.1}


def test_a_learning_rate_of_zero_changes_nothing(trainer):
    one = trainer(lr=0.0, min_lr=0.0)
    before = weights(one)
    result = one.step(plan_update(SAMPLES, max_tokens=64), lr_step=1)
    assert result.applied
    assert all(torch.equal(before[name], value) for name, value in weights(one).items())


def test_a_plan_without_a_token_is_not_applied(trainer):
    one = trainer()
    before = weights(one)
    for plan in (plan_update([], max_tokens=64), plan_update([sample(weight=0.0)], max_tokens=64)):
        result = one.step(plan, lr_step=1)
        assert (result.applied, result.loss, dict(result.metrics)) == (False, 0.0, {})
    assert all(torch.equal(before[name], value) for name, value in weights(one).items())


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_what_is_not_finite_is_refused_and_the_next_update_is_as_if_it_had_not_been(trainer, poison):
    one, other = trainer(task="sft"), trainer(task="sft")
    good = plan_update(AS_TEXT, max_tokens=64)
    before = weights(one)
    parameter = next(one.chunks[0].parameters())
    if poison == "loss":
        bad: UpdatePlan = plan_update([replace(s, loss_weights=(0.0, *[1e38] * 4)) for s in AS_TEXT[:1]], max_tokens=64)
        (batch,) = bad.micro_batches[0]
        bad = replace(bad, micro_batches=((replace(batch, loss_weights=batch.loss_weights * np.float32(3e38)),),))
        with pytest.raises(NumericsError, match="loss is inf .*loss is not finite: 1.*No weight was changed"):
            one.step(bad, lr_step=1)
    else:
        hook = parameter.register_hook(lambda grad: grad * math.nan)
        with pytest.raises(NumericsError, match="norm nan; both must be finite.*loss is not finite: 0"):
            one.step(good, lr_step=1)
        hook.remove()
    assert all(torch.equal(before[name], value) for name, value in weights(one).items())
    assert one.step(good, lr_step=1).loss == other.step(good, lr_step=1).loss
    assert all(torch.equal(value, weights(other)[name]) for name, value in weights(one).items())


def test_padding_and_empty_micro_batches_change_nothing_but_the_packed_tokens(trainer):
    plan = plan_update(AS_TEXT, max_tokens=64)
    padded = plan_update(AS_TEXT, max_tokens=64, align=8)
    empty = plan_update([], max_tokens=8), plan_update(AS_TEXT[:1], max_tokens=8, dp_size=2, align=4).micro_batches[1]
    assert empty[0].micro_batches == ((),)
    with_empty = replace(padded, micro_batches=((*padded.micro_batches[0], *empty[1]),))
    one, other = trainer(task="sft").step(plan, lr_step=1), trainer(task="sft").step(with_empty, lr_step=1)
    assert other.loss == pytest.approx(one.loss, rel=1e-6)
    assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)
    assert (one.metrics["tokens/packed"], other.metrics["tokens/packed"]) == (14, 16 + 4)


def test_every_metric_has_a_row_in_the_table(trainer):
    plan = plan_update(SAMPLES, max_tokens=64)
    one = trainer(kl_coef=0.1)
    check(one.step(plan, lr_step=1, ref_log_probs=one.score(plan.micro_batches[0])).metrics)
    check(trainer(importance_sampling="masked").step(plan, lr_step=1).metrics)
    check(trainer(task="sft").step(plan_update(AS_TEXT, max_tokens=64), lr_step=1).metrics)
