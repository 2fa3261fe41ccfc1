"""Which warnings are kept from the screen: those of the table from the modules it names, and no others."""

from __future__ import annotations

import warnings

import pytest

from megatron_pz.platform import harmless

RAISED = {
    ("megatron.core.transformer.transformer_config", UserWarning): "full scope is deprecated. Use empty",
    ("megatron.core.tensor_parallel.layers", UserWarning): (
        "`sequence_parallel` is set to `True`, but tensor model parallel size is 1. Disabling sequence parallel."
    ),
    ("megatron.core.optimizer.optimizer", UserWarning): "The .grad attribute of a Tensor that is not a leaf Tensor is",
    (
        "torch.distributed.c10d_logger",
        FutureWarning,
    ): "`torch.distributed.all_gather_into_tensor` is deprecated. Please",
    ("megatron.core.dist_checkpointing.strategies.torch", FutureWarning): "`load_state_dict` is deprecated and will be",
    ("torch.distributed.checkpoint.planner_helpers", FutureWarning): (
        "Please use DTensor instead and we are deprecating ShardedTensor."
    ),
}


def shown(message: str, category: type[Warning], module: str) -> bool:
    """Whether `message`, raised by `module`, is shown once the table is in force."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        harmless.silence(harmless.EVERYWHERE)
        warnings.warn_explicit(message, category, f"{module}.py", 1, module=module)
    return bool(caught)


@pytest.mark.parametrize("module, category", RAISED)
def test_a_harmless_warning_is_silent_where_it_is_at_home_and_shown_elsewhere(
    module: str, category: type[Warning]
) -> None:
    message = RAISED[module, category]
    assert not shown(message, category, module)
    assert shown(message, category, "my_own.module")


def test_other_warnings_of_the_same_modules_are_shown() -> None:
    for module, category in RAISED:
        assert shown("something else is wrong", category, module)


def test_each_row_of_the_table_is_raised_by_a_test() -> None:
    assert len(harmless.EVERYWHERE) == len(RAISED)
