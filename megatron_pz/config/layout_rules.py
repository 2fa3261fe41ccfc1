"""Rules of how a run is shared out over ranks: one small function a subject; `config.rules` applies them with the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron_pz.config.schema import Config

Rule = Callable[[Config, int], Iterator[str]]
"""(settings, number of ranks) -> faults, a sentence each."""


def world_is_divided(config: Config, world_size: int) -> Iterator[str]:
    sizes = config.parallel
    tensor, pipeline, context = (
        sizes.tensor_model_parallel_size,
        sizes.pipeline_model_parallel_size,
        sizes.context_parallel_size,
    )
    model_ranks = tensor * pipeline * context
    if model_ranks > 0 and world_size % model_ranks:
        yield (
            f"{world_size} ranks cannot be shared out: tensor x pipeline x context parallel is "
            f"{tensor} x {pipeline} x {context} = {model_ranks}, which must divide the number of ranks. "
            f"Start a multiple of {model_ranks} ranks or make the sizes smaller."
        )
    expert_tensor = max(1, sizes.expert_tensor_parallel_size)
    expert_ranks = expert_tensor * sizes.expert_model_parallel_size * pipeline
    if expert_ranks > pipeline > 0 and world_size % expert_ranks:
        yield (
            f"{world_size} ranks cannot be shared out over the experts: expert tensor x expert x pipeline parallel is "
            f"{expert_tensor} x {sizes.expert_model_parallel_size} x {pipeline} = {expert_ranks}, which must divide "
            f"the number of ranks. Start a multiple of {expert_ranks} ranks or make the sizes smaller."
        )


def sequence_parallel_has_tensor_parallel(config: Config, world_size: int) -> Iterator[str]:
    sizes = config.parallel
    if sizes.sequence_parallel and sizes.tensor_model_parallel_size == 1:
        yield (
            "parallel.sequence_parallel is true while parallel.tensor_model_parallel_size is 1; it shards over "
            "tensor-parallel ranks, so it needs 2 or more of them. Leave it out."
        )
    if sizes.expert_model_parallel_size > 1 and sizes.tensor_model_parallel_size > 1 and not sizes.sequence_parallel:
        yield (
            f"parallel.expert_model_parallel_size is {sizes.expert_model_parallel_size} and "
            f"tensor_model_parallel_size {sizes.tensor_model_parallel_size}; Megatron trains experts under tensor "
            "parallelism only with parallel.sequence_parallel. Set it to true."
        )


def interleaved_stages_have_a_pipeline(config: Config, world_size: int) -> Iterator[str]:
    sizes = config.parallel
    if sizes.virtual_pipeline_model_parallel_size > 1 and sizes.pipeline_model_parallel_size == 1:
        yield (
            f"parallel.virtual_pipeline_model_parallel_size is {sizes.virtual_pipeline_model_parallel_size} while "
            "parallel.pipeline_model_parallel_size is 1; it cuts pipeline stages into pieces, so it needs 2 or more of them. "
            "Leave it out, or set --pipeline-model-parallel-size."
        )
    group = config.transformer.get("microbatch_group_size_per_vp_stage", sizes.pipeline_model_parallel_size)
    if isinstance(group, int) and group < sizes.pipeline_model_parallel_size:
        yield (
            f"transformer.microbatch_group_size_per_vp_stage is {group}, below parallel.pipeline_model_parallel_size "
            f"{sizes.pipeline_model_parallel_size}; a piece takes at least one micro-batch for each stage before it is the next "
            "piece's turn. Leave it out, or raise it."
        )


def shared_gpus_are_there(config: Config, world_size: int) -> Iterator[str]:
    sglang = config.sglang
    on_gpus = sglang.num_servers * sglang.gpus_per_server
    if sglang.colocate and not sglang.server_urls and on_gpus > world_size:
        yield (
            f"sglang.colocate is true with sglang.num_servers {sglang.num_servers} x sglang.gpus_per_server "
            f"{sglang.gpus_per_server} = {on_gpus} GPUs, and the trainer has {world_size}. Start fewer or smaller servers."
        )


LAYOUT_RULES: tuple[Rule, ...] = (
    world_is_divided,
    sequence_parallel_has_tensor_parallel,
    interleaved_stages_have_a_pipeline,
    shared_gpus_are_there,
)
