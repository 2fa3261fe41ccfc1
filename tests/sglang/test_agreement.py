"""A real server and the trainer, with the same weights, give the same tokens the same log-probs; MoE also by replayed routing.

The way is that of a run: completions -> samples -> packing -> `Trainer.score`. Figures are printed (pytest -s).
"""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import sglang_models
from builders import group, rollout

from megatron_pz.config.schema import Config, EngineConfig, ModelConfig, TrainConfig
from megatron_pz.platform.select import select_platform
from megatron_pz.types import SamplingParams

PLATFORM = select_platform("cpu")  # before Megatron is imported

from megatron_pz.batch.samples import to_samples  # noqa: E402
from megatron_pz.batch.schedule import plan_update  # noqa: E402
from megatron_pz.checkpoint.hf_import import load_hf_weights  # noqa: E402
from megatron_pz.models.folder import read_hf_config  # noqa: E402
from megatron_pz.train.model import build_model  # noqa: E402
from megatron_pz.train.parallel import init_parallel, shutdown  # noqa: E402
from megatron_pz.train.step import Trainer  # noqa: E402

TOLERANCE = 1e-4  # nats, float32; reached: see the figures that the tests print
NOISE = 2e-6  # nats: differences below it are the last bits of a log-prob
PROMPTS = [
    tuple((7 * start + 11 * place) % sglang_models.VOCAB_SIZE for place in range(5 + 9 * start)) for start in range(8)
]
PROMPTS += PROMPTS[:2]  # from the server's cache of prefixes
EXPERTS_SHAPE = (sglang_models.LAYERS, sglang_models.EXPERTS_PER_TOKEN)


@pytest.fixture(scope="module")
def parallel():
    yield init_parallel(Config().parallel, PLATFORM, seed=1)
    shutdown()


def completions(served, temperature, experts_shape=None):
    """Responses to PROMPTS, as a run would have them."""
    client = served.client(experts_shape=experts_shape)
    params = SamplingParams(max_new_tokens=32, temperature=temperature)

    async def ask():
        first, *rest = [client.generate(f"agreement {place}", ids, params) for place, ids in enumerate(PROMPTS)]
        found = [await first, *await asyncio.gather(*rest)]
        await client.close()
        return found

    return asyncio.run(ask())


def plan_of(found):
    """One update on all completions, in packed micro-batches."""
    rollouts = [replace(rollout(reward=float(n % 2)), completion=completion) for n, completion in enumerate(found)]
    return plan_update(to_samples([group(rollouts)]), max_tokens=256)


def trainer_of(served, parallel, temperature, dtype="float32", **train):
    config = Config(
        model=ModelConfig(hf_model=str(served.model_path), params_dtype=dtype),
        engine=EngineConfig(temperature=temperature),
        train=TrainConfig(**train),
    )
    chunks = build_model(read_hf_config(served.model_path), config, PLATFORM, parallel)
    load_hf_weights(chunks, served.model_path)
    return Trainer(chunks, config, PLATFORM, parallel)


def gaps(trainer, plan):
    """Trainer's log-prob less server's, of every response token."""
    batches = plan.micro_batches[0]
    parts = [
        (scores - batch.rollout_log_probs)[batch.loss_weights > 0]
        for batch, scores in zip(batches, trainer.score(batches), strict=True)
    ]
    found = np.concatenate(parts)
    assert len(found) == plan.num_tokens
    return np.abs(found)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_a_dense_model_has_the_server_s_log_probs(server, parallel, temperature):
    plan = plan_of(completions(server, temperature))
    trainer = trainer_of(server, parallel, temperature)
    found = gaps(trainer, plan)
    metrics = trainer.step(plan, lr_step=1).metrics
    print(
        f"\ndense, temperature {temperature}: {len(found)} tokens, gap {found.max():.2e}, mean {found.mean():.2e} nats"
    )
    assert found.max() < TOLERANCE
    assert metrics["mismatch/max_abs"] == pytest.approx(found.max(), abs=1e-6)
    assert metrics["mismatch_kl"] < TOLERANCE**2


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_moe_has_the_server_s_log_probs_and_no_others_with_its_routing_replayed(moe_server, parallel, temperature):
    plan = plan_of(completions(moe_server, temperature, EXPERTS_SHAPE))
    free = gaps(trainer_of(moe_server, parallel, temperature), plan)
    trainer = trainer_of(moe_server, parallel, temperature, routing_replay=True)
    replayed = gaps(trainer, plan)
    metrics = trainer.step(plan, lr_step=1).metrics
    print(
        f"\nMoE, temperature {temperature}: {len(free)} tokens, gap {free.max():.2e}, mean {free.mean():.2e} nats; "
        f"replayed {replayed.max():.2e}, mean {replayed.mean():.2e}"
    )
    assert free.max() < TOLERANCE and replayed.max() < TOLERANCE
    assert replayed.max() <= free.max() + NOISE
    assert metrics["mismatch/max_abs"] == pytest.approx(replayed.max(), abs=1e-6)


def test_replay_closes_a_gap_that_other_experts_make(moe_server, parallel):
    """The trainer in bfloat16 chooses other experts than the float32 server for some tokens."""
    plan = plan_of(completions(moe_server, 1.0, EXPERTS_SHAPE))
    free = gaps(trainer_of(moe_server, parallel, 1.0, "bfloat16"), plan)
    replayed = gaps(trainer_of(moe_server, parallel, 1.0, "bfloat16", routing_replay=True), plan)
    print(
        f"\nMoE, trainer in bfloat16: gap {free.max():.2e}, mean {free.mean():.2e} nats; "
        f"replayed {replayed.max():.2e}, mean {replayed.mean():.2e}"
    )
    assert replayed.mean() < free.mean()
    assert replayed.max() <= free.max()
