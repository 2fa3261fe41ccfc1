"""Learning rate by step, and the records of Megatron that settings are handed on to."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from megatron_pz.config.schema import Config, ModelConfig, ParallelConfig, TrainConfig
from megatron_pz.errors import ConfigError
from megatron_pz.platform.select import select_platform

select_platform("cpu")  # before Megatron is imported

import torch  # noqa: E402

from megatron_pz.train.model import ddp_config  # noqa: E402
from megatron_pz.train.optimizer import LrSchedule, optimizer_config, set_learning_rate  # noqa: E402


def rates(**settings):
    """Learning rates of updates 1 to 6, highest 1.0, lowest 0.2, decay over 4."""
    train = TrainConfig(**{"lr": 1.0, "min_lr": 0.2, "lr_decay_iters": 4, "train_iters": 100, **settings})
    return [LrSchedule.of(train).at(step) for step in range(1, 7)]


def test_constant():
    assert rates(lr_decay_style="constant") == [1.0] * 6


def test_linear_falls_by_equal_steps_and_stays_at_the_bottom():
    assert rates(lr_decay_style="linear") == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.2])


def test_cosine_is_half_way_down_in_the_middle():
    # 0.2 + 0.8 * (1 + cos(pi k / 4)) / 2
    assert rates(lr_decay_style="cosine") == pytest.approx([1.0, 0.8828427, 0.6, 0.3171573, 0.2, 0.2])


def test_warm_up_rises_from_zero_and_reaches_the_top():
    assert rates(lr_decay_style="linear", lr_warmup_iters=2) == pytest.approx([0.5, 1.0, 1.0, 0.6, 0.2, 0.2])
    assert rates(lr_decay_style="constant", lr_warmup_iters=4) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_the_decay_ends_with_the_run_where_no_other_end_is_set():
    schedule = LrSchedule.of(TrainConfig(lr=1.0, min_lr=0.0, lr_decay_style="linear", lr_decay_iters=0, train_iters=10))
    assert schedule.at(6) == pytest.approx(0.5)


def test_a_rate_of_zero_stays_zero():
    assert rates(lr=0.0, min_lr=0.0, lr_decay_style="cosine", lr_warmup_iters=2) == [0.0] * 6


def test_each_group_has_its_factor_of_rate_and_decay():
    norms, matrices = {"wd_mult": 0.0, "lr_mult": 1.0}, {"wd_mult": 1.0, "lr_mult": 0.5}
    set_learning_rate(SimpleNamespace(param_groups=[norms, matrices]), 0.1, 0.01)
    assert (norms["lr"], norms["weight_decay"]) == (0.1, 0.0)
    assert (matrices["lr"], matrices["weight_decay"]) == (0.05, 0.01)


def test_settings_reach_megatron_s_optimizer_and_the_table_adds_to_them():
    made = optimizer_config(
        Config(
            model=ModelConfig(params_dtype="bfloat16"),
            train=TrainConfig(lr=0.5, adam_beta2=0.95, clip_grad=2.0, weight_decay=0.1),
            parallel=ParallelConfig(use_distributed_optimizer=False),
            optimizer={"adam_eps": 1e-5, "exp_avg_dtype": "float32"},
        )
    )
    assert (made.lr, made.adam_beta2, made.clip_grad, made.weight_decay) == (0.5, 0.95, 2.0, 0.1)
    assert (made.bf16, made.params_dtype, made.use_distributed_optimizer) == (True, torch.bfloat16, False)
    assert (made.adam_eps, made.exp_avg_dtype) == (1e-5, torch.float32)


def test_gradients_are_reduced_in_float32_unless_the_table_says_otherwise():
    assert ddp_config(Config()).grad_reduce_in_fp32
    assert not ddp_config(Config(ddp={"grad_reduce_in_fp32": False})).grad_reduce_in_fp32
    assert ddp_config(Config()).use_distributed_optimizer


@pytest.mark.parametrize(
    ("table", "setting", "message"),
    [
        ("optimizer", {"adam_epsilon": 1e-5}, "optimizer.adam_epsilon is no field .* did you mean adam_eps"),
        ("optimizer", {"lr": 1.0}, r"optimizer.lr is set by \[train\]"),
        ("ddp", {"overlap_grads_reduce": True}, "did you mean overlap_grad_reduce"),
        ("ddp", {"use_distributed_optimizer": False}, r"ddp.use_distributed_optimizer is set by \[parallel\]"),
    ],
)
def test_an_unknown_or_taken_name_is_refused(table, setting, message):
    config = replace(Config(), **{table: setting})
    with pytest.raises(ConfigError, match=message):
        optimizer_config(config) if table == "optimizer" else ddp_config(config)
