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
        owned={
            "use_distributed_optimizer": ("parallel", config.parallel.use_distributed_optimizer),
            "fp8_param_gather": ("model", config.model.fp8_param_gather),
        },
    )


def build_model(
    hf_config: HfConfig, config: Config, platform: Platform, parallel: Parallel
) -> list[DistributedDataParallel]:
    """This rank's chunks of the policy, in training mode: its pipeline stage, or with interleaving several pieces of it.

    With `init = "random"` the weights are ready; with "pretrained" they are to be loaded
    (`checkpoint.hf_import.load_hf_weights`) before the `Trainer` is made, which copies them into its optimizer.

    Raises:
        ModelError, ConfigError, LayoutError: as `models.policy.build_policy`; and ConfigError for `[ddp]`.
    """
    settings = ddp_config(config)
    chunks = []
    for index in range(parallel.num_chunks):
        policy = build_policy(
            hf_config,
            config,
            platform,
            pre_process=parallel.is_first_stage and index == 0,
            post_process=parallel.is_last_stage and index == parallel.num_chunks - 1,
            vp_stage=index if parallel.num_chunks > 1 else None,
        )
        transformer = policy.config
        stage: MegatronModule = Float16Module(transformer, policy) if transformer.bf16 else policy
        # Buckets are there to send the first gradients early; those of later chunks are done before the first chunk's.
        chunk = DistributedDataParallel(transformer, settings, stage, disable_bucketing=index > 0)
        chunk.train()
        chunks.append(chunk)
    leading = chunks[0].config
    leading.finalize_model_grads_func = finalize_model_grads
    if settings.overlap_grad_reduce:  # else each micro-batch would start a reduction
        leading.no_sync_func = [chunk.no_sync for chunk in chunks] if len(chunks) > 1 else chunks[0].no_sync
    return chunks
