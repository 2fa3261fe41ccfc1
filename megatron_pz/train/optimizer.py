"""Megatron's optimizer over the chunks, and a learning rate that is a function of the step alone."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from torch import Tensor

from megatron_pz.config.schema import Config, TrainConfig
from megatron_pz.errors import ConfigError
from megatron_pz.platform.base import torch_dtype
from megatron_pz.train.megatron_fields import megatron_record


@dataclass(frozen=True)
class LrSchedule:
    """Learning rate by step. Without state: a resumed run has nothing to restore, and nothing to count twice."""

    lr: float
    min_lr: float
    style: str  # "constant", "linear", "cosine"
    warmup_iters: int
    decay_iters: int

    @staticmethod
    def of(config: TrainConfig) -> LrSchedule:
        """The schedule of the `[train]` section."""
        decay_iters = config.lr_decay_iters or config.train_iters
        return LrSchedule(config.lr, config.min_lr, config.lr_decay_style, config.lr_warmup_iters, decay_iters)

    def at(self, step: int) -> float:
        """Learning rate of update `step`, counted from 1.

        It rises to `lr`, which update `warmup_iters` has, as does the one after it; update `decay_iters + 1` and all
        later ones have `min_lr`.

        >>> schedule = LrSchedule(1.0, 0.1, "linear", warmup_iters=2, decay_iters=5)
        >>> [round(schedule.at(step), 3) for step in range(1, 8)]
        [0.5, 1.0, 1.0, 0.7, 0.4, 0.1, 0.1]
        """
        if step <= self.warmup_iters:
            return self.lr * step / self.warmup_iters
        if self.style == "constant":
            return self.lr
        span = max(1, self.decay_iters - self.warmup_iters)
        done = min(1.0, (step - 1 - self.warmup_iters) / span)
        left = 1.0 - done if self.style == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return self.min_lr + left * (self.lr - self.min_lr)


def optimizer_config(config: Config) -> OptimizerConfig:
    """Megatron's settings of Adam and clipping, `[optimizer]` on top of ours.

    Raises:
        ConfigError: `[optimizer]` has an unknown name, or one that another section sets.
    """
    train = config.train
    is_half = config.model.params_dtype == "bfloat16"
    return megatron_record(
        OptimizerConfig,
        "optimizer",
        config.optimizer,
        ours={"optimizer": "adam"},
        owned={
            "lr": ("train", train.lr),
            "min_lr": ("train", train.min_lr),
            "weight_decay": ("train", train.weight_decay),
            "adam_beta1": ("train", train.adam_beta1),
            "adam_beta2": ("train", train.adam_beta2),
            "clip_grad": ("train", train.clip_grad),
            "bf16": ("model", is_half),
            "params_dtype": ("model", torch_dtype(config.model.params_dtype)),
            "fp8_recipe": ("model", None if config.model.fp8 == "off" else config.model.fp8),
            "use_distributed_optimizer": ("parallel", config.parallel.use_distributed_optimizer),
        },
    )


def build_optimizer(chunks: Sequence[DistributedDataParallel], config: Config) -> MegatronOptimizer:
    """Megatron's optimizer over `chunks`, whose weights must be loaded: float32 masters are copied from them now.

    Raises:
        ConfigError: as `optimizer_config`, or the optimizer would be moved to the host where all is there already.
    """
    if config.optimizer.get("optimizer_cpu_offload") and not next(chunks[0].parameters()).is_cuda:
        raise ConfigError(
            "optimizer.optimizer_cpu_offload is true on the platform cpu, where weights and optimizer are in host memory already and "
            "Megatron's offloading cannot make a step. Leave it out."
        )
    optimizer = get_megatron_optimizer(optimizer_config(config), list(chunks))
    for part in optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]:
        _start_adam(part.optimizer)
    chunks[0].config.grad_scale_func = _scale_loss_of(optimizer)
    return optimizer


def _scale_loss_of(optimizer: MegatronOptimizer) -> Callable[[Tensor], Tensor]:
    """Its `scale_loss`, which does not keep it: its shards hold the chunks where Python's collector cannot look.

    A reference from the chunks would keep both, and their process groups' threads, for the rest of the process.
    """
    kept_elsewhere = weakref.ref(optimizer)

    def scale_loss(loss: Tensor) -> Tensor:
        alive = kept_elsewhere()
        assert alive is not None, "a loss is scaled after its optimizer was dropped"
        return alive.scale_loss(loss)

    return scale_loss


def _start_adam(adam: torch.optim.Optimizer | None) -> None:
    """Give torch's Adam the moments of step 0, which it would make at the first update.

    Megatron's `sharded_state_dict` reads them, and a checkpoint may be saved before, or loaded instead of, that update.
    """
    if not isinstance(adam, torch.optim.Adam):  # Transformer Engine's is started by Megatron
        return
    for group in adam.param_groups:
        for parameter in group["params"]:
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            adam.state[parameter] = {"step": torch.tensor(0.0), **moments}


def set_learning_rate(optimizer: MegatronOptimizer, lr: float, weight_decay: float) -> None:
    """Set the next update's learning rate and weight decay, each by its parameter group's factor.

    The factor of weight decay is 0 for norms and biases; torch's Adam knows only the product.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)
