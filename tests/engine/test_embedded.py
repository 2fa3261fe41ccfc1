"""The embedded engine samples what the trainer scores: same log-probs, `transformers`' greedy tokens, any batch."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from megatron_pz.config.schema import Config, EngineConfig, ModelConfig, ParallelConfig
from megatron_pz.engine.embedded.engine import EmbeddedEngine
from megatron_pz.errors import EngineError
from megatron_pz.platform.select import select_platform
from megatron_pz.types import Completion, SamplingParams

PLATFORM = select_platform()

from megatron_pz.checkpoint.hf_import import load_hf_weights  # noqa: E402
from megatron_pz.models.policy import build_policy  # noqa: E402
from megatron_pz.models.policy_model import PolicyModel  # noqa: E402
from megatron_pz.train.decode import embedded_engine  # noqa: E402
from megatron_pz.train.parallel import init_parallel, shutdown  # noqa: E402

TOLERANCE = 1e-5  # float32, absolute
COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 16,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
MODELS = {
    "dense": Qwen3Config(**COMMON),
    "moe": Qwen3MoeConfig(**COMMON, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
}
PROMPTS = [(5, 6, 7), (5, 6, 7), (9,), (5, 6, 7), (20, 21, 22, 23, 24, 25), (5, 6, 8)]


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    init_parallel(ParallelConfig(), PLATFORM, seed=1)
    yield
    shutdown()


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(4)
    path = tmp_path_factory.mktemp(request.param)
    AutoModelForCausalLM.from_config(MODELS[request.param], dtype=torch.float32).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def policy(folder: Path) -> PolicyModel:
    from megatron_pz.models.folder import read_hf_config

    model = build_policy(read_hf_config(folder), Config(model=ModelConfig(hf_model=str(folder))), PLATFORM)
    load_hf_weights([model], folder)
    return model


def engine_of(policy: PolicyModel, rows: int = 256) -> EmbeddedEngine:
    engine = embedded_engine([policy], EngineConfig(max_running_requests=rows))
    engine.load([policy], 7)
    return engine


def ask(engine: EmbeddedEngine, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[Completion]:
    async def all_of_them() -> list[Completion]:
        return list(await asyncio.gather(*(engine.generate(p, q) for p, q in zip(prompts, params, strict=True))))

    return asyncio.run(all_of_them())


def params(seed: int, **fields: float) -> SamplingParams:
    return SamplingParams(max_new_tokens=12, seed=seed, stop_token_ids=(1,), **fields)  # type: ignore[arg-type]


def difference(policy: PolicyModel, done: Completion, temperature: float) -> float:
    """Largest absolute difference of the response's log-probs to those that the trainer computes."""
    ids = torch.tensor([done.prompt_ids + done.token_ids])
    size = ids.shape[1]
    packed = PLATFORM.packed_seq_params(torch.tensor([0, size], dtype=torch.int32))
    with torch.no_grad():
        output = policy(
            ids, torch.arange(size)[None], packed_seq_params=packed, labels=ids.roll(-1, 1), temperature=temperature
        )
    scored = output[0, len(done.prompt_ids) - 1 : -1]
    return float((scored - torch.tensor(done.logprobs)).abs().max())


def test_log_probs_are_those_that_the_trainer_computes(policy: PolicyModel) -> None:
    for temperature in (1.0, 0.6):
        asked = [params(seed, temperature=temperature) for seed in range(len(PROMPTS))]
        for done in ask(engine_of(policy), PROMPTS, asked):
            assert difference(policy, done, temperature) < TOLERANCE
            assert set(done.weight_versions) == {7}
            assert len(done.weight_versions) == len(done.token_ids)


def test_what_prompts_begin_with_in_common_is_computed_once(policy: PolicyModel) -> None:
    shots = tuple(range(10, 40))  # as the worked examples of a few-shot template
    tails = [(2, 3), (4,), (2, 3), (5, 6, 7), (2, 8), (4,)]
    engine = engine_of(policy)
    done = ask(engine, [shots + tail for tail in tails], [params(seed, temperature=0.7) for seed in range(len(tails))])
    # In sorted order: (2, 3) whole, then (8) of (2, 8), (4), (5, 6, 7); equal prompts and the shots not again.
    assert engine.counters.prefilled_tokens == 30 + 2 + 1 + 1 + 3
    assert engine.counters.prompt_tokens == 4 * 30 + 2 + 2 + 1 + 3
    assert max(difference(policy, one, 0.7) for one in done) < TOLERANCE


def test_greedy_tokens_are_those_of_transformers(policy: PolicyModel, folder: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for done in ask(engine_of(policy), PROMPTS, [params(0, temperature=0.0)] * len(PROMPTS)):
        ids = torch.tensor([done.prompt_ids])
        wanted = reference.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=1, pad_token_id=0)
        assert wanted[0, ids.shape[1] :].tolist() == list(done.token_ids)


def test_a_response_does_not_depend_on_its_batch(policy: PolicyModel) -> None:
    asked = [params(seed) for seed in range(len(PROMPTS))]
    together = ask(engine_of(policy), PROMPTS, asked)
    narrow = ask(engine_of(policy, rows=2), PROMPTS, asked)
    alone = [ask(engine_of(policy), [p], [q])[0] for p, q in zip(PROMPTS, asked, strict=True)]
    for one, two, three in zip(together, narrow, alone, strict=True):
        assert one.token_ids == two.token_ids == three.token_ids
        assert max(abs(a - b) for a, b in zip(one.logprobs, three.logprobs, strict=True)) < TOLERANCE


def test_responses_end_with_a_stop_token_or_at_their_length(policy: PolicyModel) -> None:
    done = ask(engine_of(policy), [(3, 4)] * 64, [params(seed) for seed in range(64)])
    for one in done:
        assert (one.finish_reason == "stop") == (one.token_ids[-1] == 1)
        assert 1 not in one.token_ids[:-1]
        assert len(one.token_ids) == 12 or one.finish_reason == "stop"
    assert len({one.token_ids for one in done}) > 32  # seeds make a difference


def test_an_id_outside_the_vocabulary_is_refused(policy: PolicyModel) -> None:
    with pytest.raises(EngineError, match="64"):
        ask(engine_of(policy), [(3, 64)], [params(0)])
