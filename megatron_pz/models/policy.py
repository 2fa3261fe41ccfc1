"""A stage of the policy from config.json and the settings: family, layers, random weights."""

from __future__ import annotations

from megatron_pz.config.schema import Config
from megatron_pz.models.family import HfConfig
from megatron_pz.models.logprobs import chosen_kernel
from megatron_pz.models.names import TensorShape
from megatron_pz.models.policy_model import PolicyModel
from megatron_pz.models.random_init import initialize
from megatron_pz.models.registry import family as family_of
from megatron_pz.models.routing_replay import RoutingReplay
from megatron_pz.models.transformer import padded_vocab_size, transformer_config
from megatron_pz.platform.base import Platform


def build_policy(
    hf_config: HfConfig,
    config: Config,
    platform: Platform,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
) -> PolicyModel:
    """One stage of the policy on the platform's device, weights random (by `train.seed`, equal in every layout).

    Megatron's parallel state must be initialised. With `init = "pretrained"` weights are Megatron's own random ones
    until `checkpoint.hf_import.load_hf_weights` has run.

    Args:
        hf_config: config.json of the model.
        config: sections model, parallel, train and transformer are read.
        platform: gives layers, device and the flags that depend on them.
        pre_process: this stage has the embedding.
        post_process: this stage has the head.
        vp_stage: number of the virtual stage, None without interleaving.

    Raises:
        ModelError: the family is unknown, or config.json is not as it needs.
        ConfigError: `[transformer]` has an unknown name, or the layers asked for cannot be had here, or
            `train.routing_replay` needs routers that there are not, or `train.log_prob_kernel` what there is not.
        LayoutError: the layout does not divide the model.
    """
    family = family_of(hf_config)
    fields = family.model_fields(hf_config)
    transformer = transformer_config(family, hf_config, config, platform)
    padded = padded_vocab_size(
        fields.vocab_size, config.model.make_vocab_size_divisible_by, transformer.tensor_model_parallel_size
    )
    model = PolicyModel(
        transformer,
        platform.layer_spec(transformer, vp_stage),
        family,
        hf_config,
        fields,
        TensorShape(transformer.num_query_groups, transformer.kv_channels, fields.vocab_size, padded),
        chunk_tokens=config.train.log_prob_chunk_tokens,
        log_prob_kernel=chosen_kernel(config.train.log_prob_kernel, platform.device, transformer.params_dtype),
        pre_process=pre_process,
        post_process=post_process,
        vp_stage=vp_stage,
    )
    if config.train.routing_replay:
        model.routing_replay = RoutingReplay(model.decoder.layers, transformer)
    if config.model.init == "random":
        initialize(model, config.train.seed)
    return model.to(platform.device)
