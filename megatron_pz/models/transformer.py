"""From a config.json and the settings of a run to Megatron's `TransformerConfig`."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from packaging.version import Version

from megatron_pz.config.schema import Config, ParallelConfig
from megatron_pz.config.tables import check_passed_through
from megatron_pz.errors import ConfigError, LayoutError
from megatron_pz.models.family import Family, HfConfig
from megatron_pz.platform.base import Platform, torch_dtype


def padded_vocab_size(vocab_size: int, divisible_by: int, tensor_model_parallel_size: int) -> int:
    """The smallest multiple of `divisible_by * tensor_model_parallel_size` that holds the vocabulary."""
    multiple = divisible_by * tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple


def expert_tensor_size(parallel: ParallelConfig) -> int:
    """Tensor-parallel size inside an expert. Unset: 1 where experts are shared out over ranks, else as the dense model's."""
    if parallel.expert_tensor_parallel_size:
        return parallel.expert_tensor_parallel_size
    return 1 if parallel.expert_model_parallel_size > 1 else parallel.tensor_model_parallel_size


def virtual_size(parallel: ParallelConfig) -> int | None:
    """Model chunks of a pipeline rank, as Megatron has it: None where there is one."""
    size = parallel.virtual_pipeline_model_parallel_size
    return size if size > 1 else None


def layout_fields(parallel: ParallelConfig) -> dict[str, Any]:
    """`TransformerConfig` fields of the layout."""
    tensor = parallel.tensor_model_parallel_size
    return {
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": virtual_size(parallel),
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": expert_tensor_size(parallel),
        "context_parallel_size": parallel.context_parallel_size,
        # Megatron asserts tensor_model_parallel_size > 1; with one rank there is nothing to shard.
        "sequence_parallel": parallel.sequence_parallel and tensor > 1,
        # Packed micro-batches differ in length; later stages learn the length from the one before.
        "variable_seq_lengths": parallel.pipeline_model_parallel_size > 1,
    }


def check_layout(fields: dict[str, Any], parallel: ParallelConfig) -> None:
    """Stop where the layout does not divide the model.

    Raises:
        LayoutError: naming the size, what it must divide and what would do.
    """
    tensor, groups = parallel.tensor_model_parallel_size, fields["num_query_groups"]
    experts = fields.get("num_moe_experts") or 0
    faults = []
    if groups % tensor and tensor % groups:
        faults.append(f"tensor_model_parallel_size is {tensor}; it must divide the model's {groups} query groups")
    for name in ("num_attention_heads", "ffn_hidden_size"):
        if fields[name] % tensor:
            faults.append(f"tensor_model_parallel_size is {tensor}; it must divide {name} = {fields[name]}")
    pipeline, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    if fields["num_layers"] % (pipeline * chunks):
        sizes = f"pipeline_model_parallel_size is {pipeline}"
        if chunks > 1:
            sizes = f"pipeline x virtual_pipeline_model_parallel_size is {pipeline} x {chunks} = {pipeline * chunks}"
        faults.append(f"{sizes}; it must divide num_layers = {fields['num_layers']}")
    if parallel.expert_model_parallel_size > 1 and (not experts or experts % parallel.expert_model_parallel_size):
        faults.append(
            f"expert_model_parallel_size is {parallel.expert_model_parallel_size}; it must divide the model's "
            f"{experts} experts" + ("" if experts else " (a dense model: 1)")
        )
    if experts and parallel.expert_model_parallel_size == 1 and expert_tensor_size(parallel) != tensor:
        # Megatron would take each rank's experts for shards of one model's, and leave their gradients unreduced.
        faults.append(
            f"expert_tensor_parallel_size is {parallel.expert_tensor_parallel_size}; with expert_model_parallel_size 1 "
            f"it must be tensor_model_parallel_size = {tensor}, or 0"
        )
    if experts and fields["moe_ffn_hidden_size"] % expert_tensor_size(parallel):
        faults.append(
            f"expert_tensor_parallel_size is {expert_tensor_size(parallel)}; it must divide moe_ffn_hidden_size = "
            f"{fields['moe_ffn_hidden_size']}"
        )
    if faults:
        raise LayoutError("parallel: " + "; ".join(faults) + ".")


RECIPES = {
    # Megatron's format and recipe, what a rank's tokens are a multiple of, the compute capability that it needs
    "blockwise": ("e4m3", "blockwise", 128, (9, 0)),
    "tensorwise": ("hybrid", "tensorwise", 16, (8, 9)),
    "delayed": ("hybrid", "delayed", 16, (8, 9)),
    "mxfp8": ("e4m3", "mxfp8", 32, (10, 0)),
}
"""Of each `model.fp8`. Transformer Engine's own products take multiples of 16 tokens; whole blocks of scales make it more.

Source: Megatron-Core's `fp8_utils.get_fp8_align_size`, Transformer Engine's `quantization.check_fp8_block_scaling_support`."""


def token_multiple(config: Config) -> int:
    """What each rank's tokens of a row must be a multiple of: tensor-parallel shares of a sequence, FP8 blocks.

    >>> from megatron_pz.config.schema import ModelConfig
    >>> token_multiple(Config()), token_multiple(Config(model=ModelConfig(fp8="blockwise")))
    (1, 128)
    """
    parallel = config.parallel
    shares = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    return shares * (1 if config.model.fp8 == "off" else RECIPES[config.model.fp8][2])


def fp8_fields(config: Config, fields: dict[str, Any], platform: Platform, transformer_impl: str) -> dict[str, Any]:
    """`TransformerConfig` fields of `model.fp8`.

    Args:
        fields: sizes of the model.
        transformer_impl: the layers that it is built of.

    Raises:
        ConfigError: machine, layers or sizes do not do with it.
    """
    model, parallel = config.model, config.parallel
    if model.fp8 == "off":
        return {}
    if transformer_impl != "transformer_engine":
        raise ConfigError(
            f"model.fp8 is {model.fp8!r}, but the layers are {transformer_impl!r}; FP8 is Transformer Engine's. Install it "
            "and leave out [transformer] transformer_impl, or use --fp8 off."
        )
    if model.fp8 == "delayed" and model.fp8_param_gather and fields.get("num_moe_experts"):
        # Transformer Engine 2.11 reads a grouped layer's scales before megatron-core has put those of its experts together.
        raise ConfigError(
            "model.fp8_param_gather is true while model.fp8 is 'delayed' and the model has experts: its checkpoints could not be "
            "loaded. Use --fp8 blockwise (or tensorwise), or leave out fp8_param_gather."
        )
    form, recipe, _, capability = RECIPES[model.fp8]
    if fault := platform.fp8_fault(model.fp8, capability):
        raise ConfigError(f"model.fp8 is {model.fp8!r}, but {fault}. Use --fp8 off, or another recipe.")
    tensor = parallel.tensor_model_parallel_size
    sizes = {
        "hidden_size": fields["hidden_size"],
        "num_attention_heads x head size / tensor": fields["num_attention_heads"] * fields["kv_channels"] // tensor,
        "ffn_hidden_size / tensor": fields["ffn_hidden_size"] // tensor,
    }
    if fields.get("num_moe_experts"):
        sizes["moe_ffn_hidden_size / expert tensor"] = fields["moe_ffn_hidden_size"] // expert_tensor_size(parallel)
    multiple = 32 if model.fp8 == "mxfp8" else 16
    if odd := [f"{name} = {size}" for name, size in sizes.items() if size % multiple]:
        raise ConfigError(
            f"model.fp8 is {model.fp8!r}; {', '.join(odd)} must be a multiple of {multiple}. Use --fp8 off."
        )
    return {"fp8": form, "fp8_recipe": recipe, "fp8_param": model.fp8_param_gather}


def transformer_config(family: Family, hf: HfConfig, config: Config, platform: Platform) -> TransformerConfig:
    """Megatron's configuration of the model: config.json, then the machine, the layout, and last `[transformer]`.

    Raises:
        ConfigError: `[transformer]` has an unknown name, or Megatron refuses the whole.
        LayoutError: the layout does not divide the model.
        ModelError: config.json lacks a field or uses one that is not supported.
    """
    fields = family.transformer_fields(hf)
    check_layout(fields, config.parallel)
    layout = layout_fields(config.parallel)
    dtype = torch_dtype(config.model.params_dtype)
    is_half = config.model.params_dtype == "bfloat16"
    precision = {"params_dtype": dtype, "pipeline_dtype": dtype, "bf16": is_half}
    owned = dict.fromkeys(layout, "parallel") | dict.fromkeys(precision, "model")
    owned |= dict.fromkeys(("fp8", "fp8_recipe", "fp8_param"), "model")
    owned["moe_enable_routing_replay"] = "train"  # by `routing_replay`, whose place Megatron's own would take
    check_passed_through(TransformerConfig, "transformer", config.transformer, owned)
    overrides = dict(config.transformer)
    if fields.get("num_moe_experts"):
        fields["moe_router_dtype"] = "fp32" if is_half else None
        if overrides.get("moe_aux_loss_coeff"):
            fields["moe_router_load_balancing_type"] = "aux_loss"
    defaults = platform.transformer_defaults(overrides.get("transformer_impl"))
    # Megatron's default dispatcher refuses micro-batches of different lengths, in dense models too.
    dispatcher = {"moe_token_dispatcher_type": "alltoall"}
    merged = {**dispatcher, **fields, **defaults, **layout, **precision, "calculate_per_token_loss": True, **overrides}
    merged |= fp8_fields(config, fields, platform, merged["transformer_impl"])
    _correct_router_losses(merged)
    try:
        return TransformerConfig(**merged)
    except (AssertionError, ValueError, TypeError) as error:
        raise ConfigError(f"Megatron-Core refuses this model and layout: {error}") from error


def _correct_router_losses(fields: dict[str, Any]) -> None:
    """Undo a fault of megatron-core below 0.19: under sequence or context parallelism with a per-token loss it scales the
    router's losses by the tokens of one rank, which makes their gradients smaller by the number of ranks that share them.
    """
    size = fields["context_parallel_size"]
    if fields["sequence_parallel"]:
        size *= fields["tensor_model_parallel_size"]
    if size == 1 or Version(version("megatron-core")) >= Version("0.19"):
        return
    for name in ("moe_aux_loss_coeff", "moe_z_loss_coeff"):
        coefficient = fields.get(name)
        if not coefficient:
            continue
        is_list = isinstance(coefficient, list)
        fields[name] = [size * value for value in coefficient] if is_list else size * coefficient
