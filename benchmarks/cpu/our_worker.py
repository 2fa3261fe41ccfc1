"""Our side of `grpo_vs_trl.py`: GRPO steps through the program's own parts, phases in CPU-seconds, as one JSON line.

Engine, advantages, samples, packing, schedule, loss and optimizer are those of a run; only the game is replaced, by
prompts of random words and a reward that both sides can pay without a task.

Usage: our_worker.py MODEL_DIR STEPS PROMPTS GROUP PROMPT_TOKENS RESPONSE_TOKENS DTYPE MICRO_BATCH_TOKENS
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from small_model import prompts as make_prompts

torch.set_num_threads(1)

from megatron_pz.platform.select import select_platform  # noqa: E402

platform = select_platform("cpu")

from megatron_pz.batch.samples import to_samples  # noqa: E402
from megatron_pz.checkpoint.hf_import import load_hf_weights  # noqa: E402
from megatron_pz.config.schema import Config, EngineConfig, ModelConfig, TrainConfig  # noqa: E402
from megatron_pz.engine.base import converse  # noqa: E402
from megatron_pz.game.advantages import advantages  # noqa: E402
from megatron_pz.models.folder import read_hf_config  # noqa: E402
from megatron_pz.train.deal import deal  # noqa: E402
from megatron_pz.train.decode import embedded_engine  # noqa: E402
from megatron_pz.train.learn import Learner  # noqa: E402
from megatron_pz.train.model import build_model  # noqa: E402
from megatron_pz.train.parallel import init_parallel, shutdown  # noqa: E402
from megatron_pz.train.step import Trainer  # noqa: E402
from megatron_pz.types import Completion, Group, Role, Rollout, SamplingParams  # noqa: E402


def grouped(completions: Sequence[Completion], size: int) -> list[Group]:
    """Every `size` completions one group, rewarded as TRL's are: the parity of the first token."""
    groups = []
    for start in range(0, len(completions), size):
        members = completions[start : start + size]
        rewards = [float(member.token_ids[0] % 2) for member in members]
        rollouts = [
            Rollout(Role.PREDICTOR, "-", str(start), "-", "", "", member, None, None, True, None, reward)
            for member, reward in zip(members, rewards, strict=True)
        ]
        # TRL trains on every completion, also those of groups without a difference; so does this.
        groups.append(Group(str(start), Role.PREDICTOR, tuple(rollouts), advantages(rewards), trained=True))
    return groups


def main() -> None:
    """Run the steps; the first warms up."""
    folder = Path(sys.argv[1])
    steps, num_prompts, group, prompt_tokens, response_tokens = (int(value) for value in sys.argv[2:7])
    config = Config(
        model=ModelConfig(hf_model=str(folder), params_dtype=sys.argv[7]),  # type: ignore[arg-type]
        engine=EngineConfig(max_response_tokens=response_tokens),
        train=TrainConfig(
            lr=1e-4,
            lr_decay_style="constant",
            train_iters=steps,
            weight_decay=0.0,
            max_tokens_per_micro_batch=int(sys.argv[8]),
        ),
    )
    parallel = init_parallel(config.parallel, platform, config.train.seed)
    hf_config = read_hf_config(folder)
    chunks = build_model(hf_config, config, platform, parallel)
    load_hf_weights(chunks, folder)
    trainer = Trainer(chunks, config, platform, parallel)
    learner = Learner(trainer, config.train, Path("unused"), parallel.rank)
    engine = embedded_engine(chunks, config.engine)
    every_prompt = make_prompts(num_prompts * steps, prompt_tokens)
    spent, checks = [], {}
    for step in range(1, steps + 1):
        batch = every_prompt[(step - 1) * num_prompts : step * num_prompts]
        engine.load(chunks, step - 1)

        async def play(batch: list[list[int]] = batch, step: int = step) -> list[Completion]:
            asked = [
                engine.generate(ids, SamplingParams(response_tokens, seed=step * 10_000 + place * group + copy))
                for place, ids in enumerate(batch)
                for copy in range(group)
            ]
            return await asyncio.gather(*asked)

        start = time.process_time()
        completions = converse(engine, play)
        generated = time.process_time()
        assert completions is not None
        samples = to_samples(grouped(completions, group))
        result = learner.learn(deal(samples, config, parallel, step, hf_config), step)
        spent.append((generated - start, time.process_time() - generated))
        checks = {
            "trained_tokens": int(result.metrics["tokens/trained"]),
            "packed_tokens": int(result.metrics["tokens/packed"]),
            "generated_tokens": sum(len(completion.token_ids) for completion in completions),
            "mismatch_kl": result.metrics["mismatch_kl"],
        }
    kept = spent[1:]
    print(json.dumps({
        "generate_cpu_s": sum(g for g, _ in kept) / len(kept),
        "train_cpu_s": sum(t for _, t in kept) / len(kept),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        **checks,
    }))  # fmt: skip
    shutdown()


if __name__ == "__main__":
    main()
