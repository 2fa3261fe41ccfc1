"""Each cause of a gap between a real server's log-probs and the trainer's is injected, and the report names it first.

One side is made to differ from the other: the server by its weights, its flags or its requests, or the trainer by its settings,
which is the same gap. Tables are printed (pytest -s).
"""

import asyncio
import json
import shutil
from dataclasses import replace

import programs
import pytest
import sglang_models
import torch
from safetensors.torch import load_file, save_file

from megatron_pz.checkpoint.completion_lines import to_row
from megatron_pz.checkpoint.journal import CompletionJournal
from megatron_pz.config.load import to_toml
from megatron_pz.config.schema import Config, CorpusConfig, EngineConfig, ModelConfig, TrainConfig
from megatron_pz.platform.select import select_platform
from megatron_pz.report.jsonl import JsonLines
from megatron_pz.types import Completion, SamplingParams

PLATFORM = select_platform("cpu")  # before Megatron is imported

from megatron_pz.checkpoint.hf_import import load_hf_weights  # noqa: E402
from megatron_pz.checkpoint.store import CheckpointStore  # noqa: E402
from megatron_pz.models.folder import read_hf_config  # noqa: E402
from megatron_pz.train.mismatch import FLOOR, mismatch_budget  # noqa: E402
from megatron_pz.train.model import build_model  # noqa: E402
from megatron_pz.train.parallel import init_parallel, shutdown  # noqa: E402
from megatron_pz.train.rescoring import nucleus_mass  # noqa: E402
from megatron_pz.train.state import RunState  # noqa: E402
from megatron_pz.train.step import Trainer  # noqa: E402

SHARED = tuple(
    (5 * place) % sglang_models.VOCAB_SIZE for place in range(40)
)  # a template, which all prompts begin with
PROMPTS = [
    (*SHARED, *((7 * start + 11 * place) % sglang_models.VOCAB_SIZE for place in range(5 + 4 * start)))
    for start in range(6)
]
EXPERTS_SHAPE = (sglang_models.LAYERS, sglang_models.EXPERTS_PER_TOKEN)


def ask(served, prompts=PROMPTS, experts_shape=None, **params):
    """Completions, as a run has them."""
    client = served.client(experts_shape=experts_shape)
    wanted = SamplingParams(max_new_tokens=24, **params)

    async def all_of_them():
        found = await asyncio.gather(*(client.generate(f"m {n}", ids, wanted) for n, ids in enumerate(prompts)))
        await client.close()
        return found

    return asyncio.run(all_of_them())


def write(run_dir, step, answers):
    """The journal of a round."""
    path = CompletionJournal(run_dir / "journal").path(step)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = JsonLines(path)
    file.append([to_row(str(place), answer) for place, answer in enumerate(answers)])
    file.close()


def settings(model, dtype="float32", engine=None, **train):
    return Config(
        model=ModelConfig(hf_model=str(model), params_dtype=dtype),
        engine=EngineConfig(engine="sglang", **(engine or {})),
        train=TrainConfig(**train),
    )


def report(run_dir, config, steps=()):
    """The budget, printed."""
    budget = mismatch_budget(config, run_dir, steps)
    print("\n" + "\n".join(budget.told()))
    assert budget.unexplained + sum(line.nats for line in budget.lines) == pytest.approx(budget.mean)
    return budget


def changed_copy(model, folder, change):
    """A copy of a model's folder, `change(name, tensor)` for each of its weights."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    changed = {name: change(name, tensor).contiguous() for name, tensor in tensors.items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def hand_over(served, folder, version="default"):
    served.call("/update_weights_from_disk", {"model_path": str(folder), "weight_version": version})


def noisy(scale, only=""):
    draw = torch.Generator().manual_seed(3)
    return lambda name, tensor: (
        tensor * (1 + scale * torch.randn(tensor.shape, generator=draw)) if only in name else tensor
    )


def rounded(only=""):
    return lambda name, tensor: tensor.bfloat16().float() if only in name else tensor


def test_without_a_fault_there_is_nothing_to_explain(server, tmp_path):
    write(tmp_path, 1, ask(server, temperature=0.7))
    budget = report(tmp_path, settings(server.model_path, engine={"temperature": 0.7}))
    assert budget.mean < FLOOR and budget.lines == () and budget.num_tokens == 24 * len(PROMPTS)


def test_another_temperature_than_the_run_believes(server, tmp_path):
    write(tmp_path, 1, ask(server, temperature=0.7))
    (line,) = report(tmp_path, settings(server.model_path)).lines
    assert (line.cause, line.found) == ("temperature", "temperature 0.7") and line.share > 0.99


def test_log_probs_after_top_p(server, tmp_path):
    """The server reports all of the vocabulary's log-probs; from these, what an engine that renormalises would say."""
    answers = []
    for prompt in PROMPTS:
        told = server.call(
            "/generate",
            {
                "input_ids": prompt,
                "sampling_params": {"max_new_tokens": 24, "top_p": 0.8},
                "return_logprob": True,
                "top_logprobs_num": sglang_models.VOCAB_SIZE,
            },
        )
        meta = told["meta_info"]
        every = torch.tensor(
            [[p for p, *_ in sorted(of, key=lambda row: row[1])] for of in meta["output_top_logprobs"]]
        )
        logs = nucleus_mass(every, 0.8).log().tolist()
        own = [p for p, *_ in meta["output_token_logprobs"]]
        nucleus = [p - log for p, log in zip(own, logs, strict=True)]
        assert max(nucleus) <= 1e-6
        answers.append(Completion(prompt, tuple(told["output_ids"]), tuple(nucleus), "length"))
    write(tmp_path, 1, answers)
    (line,) = report(tmp_path, settings(server.model_path, engine={"top_p": 0.8})).lines
    assert (line.cause, line.found) == ("top-p", "log-probs of the nucleus 0.8") and line.share > 0.95


@pytest.mark.parametrize(
    ("only", "cause"), [("", "bf16 against float32"), ("lm_head", "head precision"), ("norm", "norm precision")]
)
def test_weights_that_were_rounded_on_their_way(server, tmp_path, only, cause):
    sent = changed_copy(server.model_path, tmp_path / "rounded", rounded(only))
    try:
        hand_over(server, sent)
        write(tmp_path, 1, ask(server))
    finally:
        server.restore()
    (line,) = report(tmp_path, settings(server.model_path)).lines
    assert line.cause == cause and "rounded to bfloat16" in line.found and line.share > 0.95


def test_a_trainer_in_bfloat16(server, tmp_path):
    write(tmp_path, 1, ask(server))
    first, *_ = report(tmp_path, settings(server.model_path, "bfloat16")).lines
    assert (first.cause, first.found) == ("bf16 against float32", "float32 throughout") and first.share > 0.99


def test_another_rotary_base_than_the_server_s(server, tmp_path):
    mine = changed_copy(server.model_path, tmp_path / "mine", lambda name, tensor: tensor)
    fields = json.loads((mine / "config.json").read_text())
    fields["rope_parameters"]["rope_theta"] = 1e6
    (mine / "config.json").write_text(json.dumps(fields))
    write(tmp_path, 1, ask(server))
    (line,) = report(tmp_path, settings(mine)).lines
    assert (line.cause, line.found) == ("RoPE", "rotary base 10000") and line.share > 0.99


def test_experts_that_the_server_chose_otherwise(moe_server, tmp_path):
    sent = changed_copy(moe_server.model_path, tmp_path / "noisy", noisy(0.02, "mlp.gate.weight"))
    try:
        hand_over(moe_server, sent)
        answers = ask(moe_server, experts_shape=EXPERTS_SHAPE)
    finally:
        moe_server.restore()
    write(tmp_path, 1, answers)
    first, *_ = report(tmp_path, settings(moe_server.model_path)).lines
    assert (first.cause, first.found) == ("router choice", "the server's experts") and first.share > 0.3
    assert "routing_replay = true" in first.setting


@pytest.fixture
def two_versions(server, tmp_path):
    """A run directory whose second policy is `tmp_path / "second"`."""
    second = changed_copy(server.model_path, tmp_path / "second", noisy(0.03))
    config = settings(second)
    parallel = init_parallel(config.parallel, PLATFORM, 1)
    try:
        chunks = build_model(read_hf_config(second), config, PLATFORM, parallel)
        load_hf_weights(chunks, second)
        store = CheckpointStore(tmp_path / "checkpoints", 9)
        state = RunState(1, step=1, position=2, policy_version=1)
        store.save(1, chunks, Trainer(chunks, config, PLATFORM, parallel).optimizer, state.to_json())
    finally:
        shutdown()
    yield tmp_path, second
    server.restore()


@pytest.mark.parametrize(
    ("stamp", "found"),
    [
        ("0", "the versions that sampled"),  # the round was played ahead, and its stamps say so
        ("1", "one version before the stamped"),  # the server kept its weights, and says otherwise
    ],
)
def test_tokens_of_an_older_policy(server, two_versions, stamp, found):
    run_dir, _ = two_versions
    hand_over(server, server.model_path, stamp)
    write(run_dir, 2, ask(server))
    first, *_ = report(run_dir, settings(server.model_path)).lines
    assert (first.cause, first.found) == ("stale versions", found) and first.share > 0.99


def test_a_prefix_cache_that_was_not_flushed(server, two_versions):
    run_dir, second = two_versions
    hand_over(server, server.model_path, "0")
    write(run_dir, 1, ask(server, [(*SHARED, 9)]))
    body = {"model_path": str(second), "weight_version": "1", "flush_cache": False}
    server.call("/update_weights_from_disk", body)
    write(run_dir, 2, ask(server))
    (line,) = report(run_dir, settings(server.model_path), [2]).lines
    assert line.cause == "stale prefix cache" and line.share > 0.9
    assert "flush" in line.setting


def test_a_server_in_bfloat16(launch, dense_model, tmp_path):
    """The trainer in bfloat16 repeats a part of its rounding only: the rest stays unexplained, and no other cause is blamed."""
    served = launch(dense_model, dtype="bfloat16", **{"enable-fp32-lm-head": True})
    try:
        write(tmp_path, 1, ask(served))
    finally:
        served.process.stop(at_once=True)
    seen = report(tmp_path, settings(dense_model))
    (line,) = seen.lines
    assert (line.cause, line.found) == ("bf16 against float32", "bfloat16 throughout") and line.share > 0.2
    same = report(tmp_path, settings(dense_model, "bfloat16"))
    assert same.lines == () and same.mean == pytest.approx(seen.unexplained)


def test_the_tool_prints_the_table_and_says_what_it_lacks(server, tmp_path, capsys):
    tool = programs.tool("mismatch_report")
    config = replace(settings(server.model_path), corpus=CorpusConfig("text.jsonl"))
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert tool.main([str(tmp_path)]) == 2
    assert "no step can be scored" in capsys.readouterr().err
    write(tmp_path, 1, ask(server, temperature=0.5))
    assert tool.main([str(tmp_path), "--steps", "1"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith(f"step 1, {24 * len(PROMPTS)} tokens: mean gap ")
    assert told[1].split() == ["cause", "nats", "share", "what", "closes", "it", "setting"]
    assert told[2].startswith("temperature ") and "temperature 0.5" in told[2]
    assert told[-1].startswith("not looked for: stale prefix cache")
    assert tool.main([str(tmp_path), "--steps", "3"]) == 2
    assert "step 3 cannot be scored" in capsys.readouterr().err
