"""The policy made ready to train: Megatron's wrappers for precision and data parallelism around `PolicyModel`."""

from __future__ import annotations

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.transformer.module import Float16Module, MegatronModule

from megatron_pz.config.schema import Config
from megatron_pz.models.family import HfConfig
from megatron_pz.models.policy import build_policy
from megatron_pz.platform.base import Platform
from megatron_pz.train.megatron_fields import megatron_record
from megatron_pz.train.parallel import Parallel


def ddp_config(config: Config) -> DistributedDataParallelConfig:
    """Megatron's settings of gradient buffers and their reduction, `[ddp]` on top of ours.

    Raises:
        ConfigError: `[ddp]` has an unknown name, or one that another section sets.
    """
    return megatron_record(
        DistributedDataParallelConfig,
        "ddp",
        config.ddp,
        ours={"grad_reduce_in_fp32": True},
        owned={"use_distributed_optimizer": ("parallel", config.parallel.use_distributed_optimizer)},
    )


def build_model(
    hf_config: HfConfig, config: Config, platform: Platform, parallel: Parallel
) -> list[DistributedDataParallel]:
    """This rank's stage of the policy, as a list of one chunk, in training mode.

    With `init = "random"` the weights are ready; with "pretrained" they are to be loaded
    (`checkpoint.hf_import.load_hf_weights`) before the `Trainer` is made, which copies them into its optimizer.

    Raises:
        ModelError, ConfigError, LayoutError: as `models.policy.build_policy`; and ConfigError for `[ddp]`.
    """
    settings = ddp_config(config)
    policy = build_policy(
        hf_config, config, platform, pre_process=parallel.is_first_stage, post_process=parallel.is_last_stage
    )
    transformer = policy.config
    stage: MegatronModule = Float16Module(transformer, policy) if transformer.bf16 else policy
    chunk = DistributedDataParallel(transformer, settings, stage)
    transformer.finalize_model_grads_func = finalize_model_grads
    if settings.overlap_grad_reduce:
        transformer.no_sync_func = chunk.no_sync  # else each micro-batch would start a reduction
    chunk.train()
    return [chunk]
