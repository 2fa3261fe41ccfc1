"""The embedded engine in several layouts, all in one run of torchrun: what it answers, and how much work that took.

torchrun --nproc-per-node N engine_worker.py OUT.json one|two|four

Each case takes down Megatron's groups and builds its own model, random but the same in every layout. Rank 0 holds two
conversations, with other weights in the second; the rest follow. OUT.json: for each case `done` (both conversations'
completions), `work` (counters of every rank), `speakers` (which ranks tell rank 0 what their replica has sampled); for
a layout that is refused, `error`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_pz.platform.select import select_platform

PLATFORM = select_platform("cpu")

from megatron.core import parallel_state  # noqa: E402

from megatron_pz.config.schema import Config, EngineConfig, ModelConfig, ParallelConfig, TrainConfig  # noqa: E402
from megatron_pz.engine.base import converse  # noqa: E402
from megatron_pz.errors import EngineError  # noqa: E402
from megatron_pz.train.decode import embedded_engine  # noqa: E402
from megatron_pz.train.model import build_model  # noqa: E402
from megatron_pz.train.parallel import init_parallel, shutdown  # noqa: E402
from megatron_pz.types import Completion, SamplingParams  # noqa: E402

VOCAB_SIZE, STOP = 59, 3  # prime: every layout has to pad it
DENSE = {
    "model_type": "qwen3",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "tie_word_embeddings": True,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
MODELS = {"dense": DENSE, "moe": DENSE | EXPERTS | {"model_type": "qwen3_moe", "tie_word_embeddings": False}}
TP2, PP2, EP2 = ({f"{name}_model_parallel_size": 2} for name in ("tensor", "pipeline", "expert"))
SP, CP2 = {"sequence_parallel": True}, {"context_parallel_size": 2}

CASES: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "one": {"dense": ("dense", {}), "moe": ("moe", {})},
    "two": {
        "dense dp2": ("dense", {}),
        "dense tp2": ("dense", TP2),
        "dense tp2 sp": ("dense", TP2 | SP),
        "dense pp2": ("dense", PP2),
        "dense cp2": ("dense", CP2),
        "moe cp2 ep2": ("moe", CP2 | EP2),
        "moe dp2": ("moe", {}),
        "moe ep2": ("moe", EP2),
        "moe tp2": ("moe", TP2),
        "moe tp2 sp ep2": ("moe", TP2 | SP | EP2),
    },
    "four": {
        "dense tp2 dp2": ("dense", TP2),
        "moe ep2 dp4": ("moe", EP2),
        "moe tp2 sp ep2 dp2": ("moe", TP2 | SP | EP2),
    },
}

PROMPTS = (
    (5, 6, 7, 8),  # asked by a group of four
    (5, 6, 7, 9, 10),  # by a group of four, begins like the one before
    (20,),
    tuple(range(11, 37)),
)
GREEDY, NUCLEUS, COLD = {"temperature": 0.0}, {"top_p": 0.5}, {"temperature": 0.6, "top_k": 5}


def asked() -> list[tuple[tuple[int, ...], SamplingParams]]:
    """What a conversation asks at once: groups, and every setting of sampling."""
    plain = [(PROMPTS[index], {}) for index in (0, 1, 0, 1, 0, 1, 0, 1)]
    special = [(prompt, fields) for prompt in PROMPTS[2:] for fields in ({}, GREEDY, NUCLEUS, COLD)]
    return [
        (prompt, SamplingParams(max_new_tokens=9 + seed % 3, seed=seed, stop_token_ids=(STOP,), **fields))
        for seed, (prompt, fields) in enumerate(plain + special)
    ]


async def conversation(engine: Any) -> list[Completion]:
    """Two rounds: the second asks on from each answer of the first, as a prediction follows a mask."""

    async def one(prompt: tuple[int, ...], params: SamplingParams) -> tuple[Completion, Completion]:
        first = await engine.generate(prompt, params)
        longer = (1, *prompt, *first.token_ids)
        return first, await engine.generate(longer, dataclasses.replace(params, seed=params.seed + 1000))

    pairs = await asyncio.gather(*(one(prompt, params) for prompt, params in asked()))
    return [*(first for first, _ in pairs), *(second for _, second in pairs)]


def run(model: str, layout: dict[str, Any]) -> dict[str, Any]:
    config = Config(
        model=ModelConfig(init="random"),
        parallel=ParallelConfig(**layout),
        engine=EngineConfig(max_running_requests=6),  # fewer than are asked: rows enter while others run
        train=TrainConfig(seed=7),
    )
    parallel = init_parallel(config.parallel, PLATFORM, seed=1)
    chunks = build_model(MODELS[model], config, PLATFORM, parallel)
    try:
        engine = embedded_engine(chunks, config.engine)
    except EngineError as error:
        return {"error": str(error)}
    rounds = []
    for version in (4, 5):
        with torch.no_grad():
            for chunk in chunks if version == 5 else ():
                for parameter in chunk.parameters():
                    parameter.mul_(1.25)
        engine.load(chunks, version)
        rounds.append(converse(engine, lambda: conversation(engine)))
        assert all(chunk.training for chunk in chunks), "the model is left as it was: ready to train"
    everywhere: list[Any] = [None] * parallel.world_size
    dist.all_gather_object(everywhere, (dataclasses.asdict(engine.counters), engine.ranks.is_speaker))
    return {
        "done": [[dataclasses.asdict(one) for one in done] for done in rounds if done is not None],
        "work": [work for work, _ in everywhere],
        "speakers": [rank for rank, (_, speaks) in enumerate(everywhere) if speaks],
    }


def main(out: Path, which: str) -> None:
    torch.set_num_threads(1)
    report = {}
    for name, (model, layout) in CASES[which].items():
        report[name] = run(model, layout)
        parallel_state.destroy_model_parallel()
    if dist.get_rank() == 0:
        out.write_text(json.dumps(report))
    shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
