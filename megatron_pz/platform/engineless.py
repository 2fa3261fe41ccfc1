"""Where Megatron-Core is wrong without Transformer Engine, on a GPU as on a CPU: the table `PATCHES`, which both platforms apply."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from megatron_pz.platform.patch import Patch, patches_of


def _load_optimizer_state(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`_set_main_param_and_optimizer_states` without autograd, and for the keys that torch's Adam really saved."""

    @functools.wraps(stock)
    def set_states(self: Any, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        if self.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
            return stock(self, model_param, tensors)
        group, order = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group]["params"][order]
        targets = {"param": main_param, **self.optimizer.state[main_param]}
        with torch.no_grad():
            for key in targets.keys() & tensors.keys():
                targets[key].copy_(tensors[key])
        return None

    return set_states


def _probe_optimizer_state() -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    leaf = torch.ones(2, requires_grad=True)
    optimizer = SimpleNamespace(param_groups=[{"params": [leaf]}], state={leaf: {"step": torch.tensor(1.0)}})
    fake = SimpleNamespace(
        config=SimpleNamespace(use_precision_aware_optimizer_no_fp8_or_ds_fp8=False),
        model_param_group_index_map={leaf: (0, 0)},
        optimizer=optimizer,
    )
    DistributedOptimizer._set_main_param_and_optimizer_states(fake, leaf, {"param": torch.zeros(2)})


def _probe_router_gemm() -> None:
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        raise NameError("te_general_gemm")


PATCHES: tuple[Patch, ...] = (
    Patch(
        "megatron.core.transformer.moe.moe_utils:te_general_gemm",
        lambda stock: stock,
        "moe_utils.py:1192 names it even where Transformer Engine is missing; None is what it tests for",
        _probe_router_gemm,
        versions=">=0.16,<0.19",
    ),
    Patch(
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._set_main_param_and_optimizer_states",
        _load_optimizer_state,
        "loading torch's Adam state: KeyError 'step', or in-place on a leaf, distrib_optimizer.py:940",
        _probe_optimizer_state,
    ),
)


@functools.cache
def install() -> None:
    """Apply `PATCHES`, once a process. Transformer Engine must be hidden or absent: this imports megatron.core."""
    for patch in patches_of(PATCHES):
        patch.apply()
