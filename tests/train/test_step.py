"""The trainer in one process, on a tiny Qwen3. Layouts: test_layouts.py."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import sample
from small_trainer import PLATFORM, SAMPLES, TINY  # selects the platform, before Megatron is imported

from megatron_pz.batch.schedule import plan_update
from megatron_pz.config.schema import Config, EngineConfig, ModelConfig, TaskConfig, TrainConfig
from megatron_pz.errors import LayoutError, NumericsError
from megatron_pz.models.shards import unwrap
from megatron_pz.report.metrics import check
from megatron_pz.train.learn import Learner
from megatron_pz.train.loss import k3
from megatron_pz.train.model import build_model
from megatron_pz.train.parallel import init_parallel, shutdown
from megatron_pz.train.step import Trainer
from megatron_pz.types import Role, UpdatePlan

MOE = TINY | {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
}
TEXT = [replace(s, role=None, advantage=1.0) for s in SAMPLES]


@pytest.fixture(scope="module")
def parallel():
    yield init_parallel(Config().parallel, PLATFORM, seed=1)
    shutdown()


@pytest.fixture
def trainer(parallel):
    """Makes a trainer; fields of `[train]` by name, others by section."""

    def make(model=None, task="pretrain_zero", temperature=1.0, hf_config=TINY, **train):
        config = Config(
            model=model or ModelConfig(init="random"),
            task=TaskConfig(task=task),
            engine=EngineConfig(temperature=temperature),
            train=TrainConfig(**{"lr": 1e-2, "lr_decay_style": "constant", **train}),
        )
        return Trainer(build_model(hf_config, config, PLATFORM, parallel), config, PLATFORM, parallel)

    return make


def weights_of(trainer):
    return {name: value.detach().clone() for name, value in trainer.chunks[0].named_parameters()}


def logits_of(trainer, token_ids, grad=False):
    """The model's own logits of one sequence, [tokens, vocabulary], by its other path."""
    ids = torch.tensor([token_ids])
    with torch.set_grad_enabled(grad):
        return unwrap(trainer.chunks[0])(ids, torch.arange(len(token_ids))[None])[0]


def log_probs_of(trainer, token_ids, temperature=1.0, grad=False):
    """Of each token after the first."""
    table = (logits_of(trainer, token_ids, grad) / temperature).log_softmax(-1)
    return table[:-1].gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0]


def scored(trainer, samples):
    """The samples with the trainer's own log-probs as the engine's."""
    return [
        replace(s, rollout_log_probs=(0.0, *log_probs_of(trainer, s.token_ids, trainer.temperature).tolist()))
        for s in samples
    ]


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
    wanted = -sum(float((log_probs_of(one, s.token_ids) * torch.tensor(s.loss_weights[1:])).sum()) for s in TEXT)
    result = one.step(plan_update(TEXT, max_tokens=8), lr_step=1)
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
    assert all(torch.equal(value, weights_of(other)[name]) for name, value in weights_of(one).items())


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
    plan = plan_update(TEXT, max_tokens=64)
    losses = [one.step(plan, lr_step=step).loss for step in range(1, 31)]
    assert losses[0] > 3
    assert losses[-1] < 0.1


def test_bfloat16_learns_with_float32_masters(trainer):
    one = trainer(model=ModelConfig(init="random", params_dtype="bfloat16"), task="continue_pt")
    assert {value.dtype for value in one.chunks[0].parameters()} == {torch.bfloat16}
    plan = plan_update(TEXT, max_tokens=64)
    losses = [one.step(plan, lr_step=step).loss for step in range(1, 31)]
    assert losses[0] == pytest.approx(trainer(task="continue_pt").step(plan, lr_step=1).loss, rel=0.02)
    assert losses[-1] < 0.1


def test_the_gradient_norm_is_reported_before_clipping(trainer):
    plan = plan_update(TEXT, max_tokens=64)
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
    before = weights_of(one)
    result = one.step(plan_update(SAMPLES, max_tokens=64), lr_step=1)
    assert result.applied
    assert all(torch.equal(before[name], value) for name, value in weights_of(one).items())


def test_a_plan_without_a_token_is_not_applied(trainer):
    one = trainer()
    before = weights_of(one)
    for plan in (plan_update([], max_tokens=64), plan_update([sample(weight=0.0)], max_tokens=64)):
        result = one.step(plan, lr_step=1)
        assert (result.applied, result.loss, dict(result.metrics)) == (False, 0.0, {})
    assert all(torch.equal(before[name], value) for name, value in weights_of(one).items())


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_what_is_not_finite_is_refused_and_the_next_update_is_as_if_it_had_not_been(trainer, poison):
    one, other = trainer(task="sft"), trainer(task="sft")
    good = plan_update(TEXT, max_tokens=64)
    before = weights_of(one)
    parameter = next(one.chunks[0].parameters())
    if poison == "loss":
        bad: UpdatePlan = plan_update([replace(s, loss_weights=(0.0, *[1e38] * 4)) for s in TEXT[:1]], max_tokens=64)
        (batch,) = bad.micro_batches[0]
        bad = replace(bad, micro_batches=((replace(batch, loss_weights=batch.loss_weights * np.float32(3e38)),),))
        with pytest.raises(NumericsError, match="loss is inf .*loss is not finite: 1.*No weight was changed"):
            one.step(bad, lr_step=1)
    else:
        hook = parameter.register_hook(lambda grad: grad * math.nan)
        with pytest.raises(NumericsError, match="norm nan; both must be finite.*loss is not finite: 0"):
            one.step(good, lr_step=1)
        hook.remove()
    assert all(torch.equal(before[name], value) for name, value in weights_of(one).items())
    assert one.step(good, lr_step=1).loss == other.step(good, lr_step=1).loss
    assert all(torch.equal(value, weights_of(other)[name]) for name, value in weights_of(one).items())


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


def test_padding_and_empty_micro_batches_change_nothing_but_the_packed_tokens(trainer):
    plan = plan_update(TEXT, max_tokens=64)
    padded = plan_update(TEXT, max_tokens=64, align=8)
    empty = plan_update([], max_tokens=8), plan_update(TEXT[:1], max_tokens=8, dp_size=2, align=4).micro_batches[1]
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
    check(trainer(task="sft").step(plan_update(TEXT, max_tokens=64), lr_step=1).metrics)
