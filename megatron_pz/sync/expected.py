"""Is what will be sent the whole model, every tensor by its name and in its shape?

A server ends at a tensor of a wrong shape and takes an unknown name without a word. So before the first push every rank's
share is compared with what config.json alone makes of the model: parameters must not be held against themselves, or a shard
that is taken for a whole tensor would pass.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_pz.errors import ModelError
from megatron_pz.models.family import Family, require
from megatron_pz.models.shards import shards_of, unwrap

HfShape = tuple[int, ...]
MAX_FAULTS = 8  # told at once


def hf_shapes(family: Family, hf: Mapping[str, Any]) -> dict[str, HfShape]:
    """Name and shape of every tensor that the model of config.json is saved as.

    Raises:
        ModelError: the family has a tensor that this table does not know, or a size is missing.
    """
    hidden, heads = int(require(hf, "hidden_size")), int(require(hf, "num_attention_heads"))
    head_dim = int(hf.get("head_dim") or hidden // heads)
    queries, keys = heads * head_dim, int(hf.get("num_key_value_heads") or heads) * head_dim
    vocab, inner = int(require(hf, "vocab_size")), int(require(hf, "intermediate_size"))
    expert_inner, experts = (
        int(hf.get("moe_intermediate_size") or 0),
        int(hf.get("num_experts") or hf.get("num_local_experts") or 0),
    )
    layer = "model.layers.*."
    table: dict[str, HfShape] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "lm_head.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        layer + "input_layernorm.weight": (hidden,),
        layer + "post_attention_layernorm.weight": (hidden,),
        layer + "self_attn.q_proj.weight": (queries, hidden),
        layer + "self_attn.k_proj.weight": (keys, hidden),
        layer + "self_attn.v_proj.weight": (keys, hidden),
        layer + "self_attn.o_proj.weight": (hidden, queries),
        layer + "self_attn.q_norm.weight": (head_dim,),
        layer + "self_attn.k_norm.weight": (head_dim,),
        layer + "mlp.gate_proj.weight": (inner, hidden),
        layer + "mlp.up_proj.weight": (inner, hidden),
        layer + "mlp.down_proj.weight": (hidden, inner),
        layer + "mlp.gate.weight": (experts, hidden),
        layer + "mlp.experts.*.gate_proj.weight": (expert_inner, hidden),
        layer + "mlp.experts.*.up_proj.weight": (expert_inner, hidden),
        layer + "mlp.experts.*.down_proj.weight": (hidden, expert_inner),
    }
    found = {}
    for name in family.hf_names(dict(hf)):
        kind = re.sub(r"\.\d+\.", ".*.", name)
        if kind not in table:
            raise ModelError(f"{name} of {family.model_type!r} is in no table of shapes; add it to sync/expected.py.")
        found[name] = table[kind]
    return found


def check_export(chunks: Sequence[torch.nn.Module], group: Any = None) -> None:
    """Pass if all ranks together export every tensor of the model, in its shape. All ranks call it; no weights are read.

    Args:
        chunks: this rank's model chunks.
        group: gloo group of all ranks; needed with more than one.

    Raises:
        ModelError: on every rank, with the tensors that are missing, unknown, or of another shape.
    """
    policy = unwrap(chunks[0])
    own = [
        (name, shape)
        for shard in shards_of(chunks)
        if shard.entry.is_exported
        for name, shape in zip(shard.hf_names, shard.hf_shapes(), strict=True)
    ]
    everywhere: list[Any] = [own]
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        everywhere = [None] * dist.get_world_size(group)
        dist.all_gather_object(everywhere, own, group=group)
    if faults := compared({pair for rank in everywhere for pair in rank}, hf_shapes(policy.family, policy.hf_config)):
        more = f" and {len(faults) - MAX_FAULTS} more" if len(faults) > MAX_FAULTS else ""
        raise ModelError(
            f"The weights are not those of config.json, and would end the servers: {'; '.join(faults[:MAX_FAULTS])}{more}."
        )


def compared(found: set[tuple[str, HfShape]], wanted: Mapping[str, HfShape]) -> list[str]:
    """What is wrong with `found`, in words.

    >>> compared({("a", (2,)), ("b", (3,)), ("d", (1,))}, {"a": (2,), "b": (4,), "c": (5,)})
    ['b has shape (3,), not (4,)', 'c is missing', 'd is unknown']
    """
    faults = [f"{name} is unknown" for name, _ in found if name not in wanted]
    faults += [
        f"{name} has shape {shape}, not {wanted[name]}" for name, shape in found if wanted.get(name, shape) != shape
    ]
    faults += [f"{name} is missing" for name in wanted.keys() - {name for name, _ in found}]
    return sorted(faults)
