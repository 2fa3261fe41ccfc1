"""One update under a layout, and what it must agree with: gradients, weights, metrics and scores under one process.

Gradients are compared under Hugging Face's names, made whole by the mappings of the name table. Imported by workers that
torchrun has started; importing it chooses the CPU.
"""

from __future__ import annotations

import gc
import itertools
import os
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_pz.platform.select import select_platform

PLATFORM = select_platform("cpu")


from megatron_pz.batch.schedule import plan_update  # noqa: E402
from megatron_pz.config.schema import Config, ModelConfig, ParallelConfig, TrainConfig  # noqa: E402
from megatron_pz.models.shards import complete_weights, shards_of  # noqa: E402
from megatron_pz.train.deal import divisors  # noqa: E402
from megatron_pz.train.model import build_model  # noqa: E402
from megatron_pz.train.parallel import Parallel, init_parallel, shutdown  # noqa: E402
from megatron_pz.train.step import Trainer  # noqa: E402
from megatron_pz.types import Role, Sample, UpdatePlan  # noqa: E402

DENSE = {
    "model_type": "qwen3",
    "vocab_size": 250,  # padded to 256
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
UNTIED = DENSE | {"tie_word_embeddings": False}
MOE = UNTIED | {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
NOPE = DENSE | {"model_type": "smollm3", "no_rope_layer_interval": 2}
MODELS = {"dense": DENSE, "untied": UNTIED, "moe": MOE, "nope": NOPE}


@dataclass(frozen=True)
class Case:
    model: str = "dense"
    layout: dict[str, Any] = field(default_factory=dict)
    max_tokens: int = 48
    mean: str = "token_mean"
    ddp: dict[str, Any] = field(default_factory=dict)
    rescored: bool = False  # old log-probs and a reference from `score`
    importance: str = "off"
    replayed: bool = False  # every sample but one names its tokens' experts
    layers: int = 2
    packed_for: dict[str, int] = field(default_factory=dict)  # what the reference's micro-batches divide
    transformer: dict[str, Any] = field(default_factory=dict)
    updated: bool = False  # compare what one step of the distributed optimizer changes, instead of gradients
    poisoned: bool = False  # one sample has a NaN
    dtype: str = "float32"
    distributed: bool = True  # the optimizer, where a step is compared


def model_of(case: Case) -> dict[str, Any]:
    return MODELS[case.model] | {"num_hidden_layers": case.layers}


def routing(num_tokens: int, layers: int, experts: int, topk: int, seed: int) -> np.ndarray:
    """Experts drawn by lot, int16 [num_tokens, layers, topk]."""
    rng = np.random.default_rng(seed)
    return rng.random((num_tokens, layers, experts)).argsort(-1)[..., :topk].astype(np.int16)


def samples(poisoned: bool = False, replayed: bool = False, layers: int = 2) -> list[Sample]:
    """Ragged sequences of both roles; engine log-probs are near a random policy's, so that some ratios are clipped."""
    rng = np.random.default_rng(5)
    made = []
    for index in range(9):
        prompt, response = rng.integers(2, 14), rng.integers(1, 11)
        length = int(prompt + response)
        role = Role.GENERATOR if index % 3 == 0 else Role.PREDICTOR
        weight = 2.0 if role is Role.GENERATOR else 1.0
        trained = np.arange(length) >= prompt
        made.append(
            Sample(
                token_ids=tuple(int(token) for token in rng.integers(0, 250, length)),
                loss_weights=tuple(float(w) for w in weight * trained),
                rollout_log_probs=tuple(float(x) for x in rng.normal(-5.7, 0.8, length) * trained),
                advantage=float("nan") if poisoned and index == 4 else float(rng.normal()),
                role=role,
                group_id=f"1.0.{index}",
                routed_experts=routing(length - 1, layers, 4, 2, seed=index) if replayed and index != 3 else None,
            )
        )
    return made


_STORES: list[dist.Store] = []
_WORLDS = itertools.count()


def connect() -> None:
    """A new torch.distributed on torchrun's store.

    Groups end when nothing holds them any more; after some ten layouts the threads of those that do not take all the time.
    """
    if dist.is_initialized() or "RANK" not in os.environ:
        return
    gc.collect()
    if not _STORES:
        _STORES.append(next(iter(dist.rendezvous("env://")))[0])
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo", store=dist.PrefixStore(f"world {next(_WORLDS)}", _STORES[0]), rank=rank, world_size=size
    )


def build(case: Case) -> tuple[Parallel, Trainer, UpdatePlan]:
    config = Config(
        model=ModelConfig(init="random", params_dtype=case.dtype),
        parallel=ParallelConfig(**case.layout, use_distributed_optimizer=case.updated and case.distributed),
        # Clipping would scale the gradient buffers in place.
        train=TrainConfig(
            lr=1e-3,
            lr_decay_style="constant",
            kl_coef=0.1 * case.rescored,
            clip_grad=float(case.updated),
            importance_sampling=case.importance,
            routing_replay=case.replayed,
        ),
        transformer=case.transformer,
        ddp=case.ddp,
    )
    connect()
    parallel = init_parallel(config.parallel, PLATFORM, seed=1)
    trainer = Trainer(build_model(model_of(case), config, PLATFORM, parallel), config, PLATFORM, parallel)
    plan = plan_update(
        samples(case.poisoned, case.replayed, case.layers),
        max_tokens=case.max_tokens,
        dp_size=parallel.dp_size,
        loss_aggregation=case.mean,
        **(divisors(config) | case.packed_for),
    )
    return parallel, trainer, plan


def outcome(case: Case) -> dict[str, Any] | None:
    """Whole gradients (or changes of the parameters), metrics and scores of a case; on rank 0, None elsewhere."""
    parallel, trainer, plan = build(case)
    mine = plan.micro_batches[parallel.dp_rank]
    before = whole(trainer.chunks, "data")
    scored = trainer.score(mine)
    result = trainer.step(
        plan,
        lr_step=1,
        old_log_probs=[0.97 * values for values in scored] if case.rescored else None,
        ref_log_probs=[0.8 * values for values in scored] if case.rescored else None,
    )
    complete_weights(trainer.chunks)
    after = whole(trainer.chunks, "data")
    if case.updated:
        tensors = {name: after[name] - value for name, value in before.items()}
    else:
        tensors = whole(trainer.chunks, "main_grad")
    scores: dict[int, np.ndarray] = {}
    lengths = [len(sample.token_ids) for sample in samples()]
    for batch, values in zip(mine, scored, strict=True):
        bounds = zip(batch.cu_seqlens, batch.cu_seqlens[1:], batch.sample_indices, strict=False)
        scores |= {index: values[start:end][: lengths[index]] for start, end, index in bounds if index >= 0}
    everywhere: list[Any] = [None] * parallel.world_size
    dist.all_gather_object(everywhere, scores)
    shutdown()
    if not parallel.is_rank0:
        return None
    gathered = {index: values for part in everywhere for index, values in part.items()}
    return {"tensors": tensors, "weights": after, "metrics": dict(result.metrics), "scores": gathered}


def whole(chunks: Any, attribute: str) -> dict[str, torch.Tensor]:
    """An attribute of all parameters, by Hugging Face name; copies on several ranks must agree."""
    mine = [
        (shard.hf_names, shard.entry.mapping, shard.shape, shard.rank, getattr(shard.parameter, attribute).clone())
        for shard in shards_of(chunks)
    ]
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, mine)
    pieces: dict[tuple[str, ...], dict[int, torch.Tensor]] = {}
    found = {}
    for names, mapping, shape, rank, tensor in (entry for part in everywhere for entry in part):
        by_rank = pieces.setdefault(names, {})
        torch.testing.assert_close(tensor, by_rank.setdefault(rank, tensor), rtol=1e-5, atol=1e-6)
        found[names] = (mapping, shape)
    return {
        name: tensor
        for names, (mapping, shape) in found.items()
        for name, tensor in zip(
            names, mapping.to_hf([pieces[names][rank] for rank in sorted(pieces[names])], shape), strict=True
        )
    }


def compare(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Errors of a case."""
    tensors, reference = found["tensors"], wanted["tensors"]
    assert tensors.keys() == reference.keys(), tensors.keys() ^ reference.keys()
    assert all(value.abs().max() > 0 for value in reference.values()), "a parameter has no gradient"
    errors = {name: (tensors[name] - value).norm().item() for name, value in reference.items()}
    norms = {name: value.norm().item() for name, value in reference.items()}
    relative = {name: errors[name] / norms[name] for name in errors}
    worst = max(relative, key=relative.__getitem__)
    packed = {"tokens/packed"}  # alignment adds padding
    assert found["metrics"].keys() == wanted["metrics"].keys()
    return {
        "grad": float(np.linalg.norm(list(errors.values())) / np.linalg.norm(list(norms.values()))),
        "worst": relative[worst],
        "name": worst,
        "largest": max((tensors[name] - value).abs().max().item() for name, value in reference.items()),
        "weights": float(
            np.linalg.norm(
                [(found["weights"][name] - value).norm().item() for name, value in wanted["weights"].items()]
            )
            / np.linalg.norm([value.norm().item() for value in wanted["weights"].values()])
        ),
        "metrics": max(
            abs(found["metrics"][name] - value) / max(abs(value), 1e-3)
            for name, value in wanted["metrics"].items()
            if name not in packed
        ),
        "score": max(float(np.abs(found["scores"][i] - v).max()) for i, v in wanted["scores"].items()),
    }


def alone(cases: dict[str, Case]) -> dict[str, dict[str, Any]]:
    """The cases in a world of one, whatever torchrun started."""
    environment = {name: os.environ.pop(name) for name in ("RANK", "WORLD_SIZE")}
    try:
        results = {name: outcome(case) for name, case in cases.items()}
    finally:
        shutdown()
        os.environ.update(environment)
    return {name: result for name, result in results.items() if result is not None}


def reference_of(case: Case) -> Case:
    """What a case must agree with: one process, micro-batches of some sequences each, nothing overlapped."""
    return replace(case, layout={}, max_tokens=48, ddp={})
