"""The package on a GPU, beside `transformers` and its own CPU path: `make test-gpu`, a process of its own.

Each is run with Megatron's local layers, which need torch alone, and with Transformer Engine's where it is installed.
"""

import os
import subprocess
import sys
from pathlib import Path

import hf_models
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import cases

from megatron_pz.platform import transformer_engine
from megatron_pz.platform.select import select_platform

pytestmark = pytest.mark.gpu
BF16_LOGITS = 3e-2  # relative in norm
FLOAT32 = 1e-4  # other kernels, other orders of sums


@pytest.fixture(scope="module")
def platform():
    return select_platform("cuda")


@pytest.fixture(params=["local", "transformer_engine"])
def impl(request, platform):
    if request.param == "transformer_engine" and (fault := transformer_engine.fault()):
        pytest.skip(fault)
    return request.param


@pytest.mark.parametrize("name", hf_models.MODELS)
def test_logits_in_bfloat16_are_those_of_transformers(platform, impl, name, tmp_path):
    assert cases.logits_error(platform, name, tmp_path / "hf", cases.settings(impl, "bfloat16")) < BF16_LOGITS


@pytest.mark.parametrize("name", ["qwen3", "smollm3", "qwen3_moe"])
def test_gradients_are_those_of_the_cpu_in_float32(platform, impl, name, tmp_path):
    folder = tmp_path / "hf"
    cases.make(name, folder)
    cases.calm(folder)
    expected = cases.on_cpu("gradients", folder, tmp_path / "cpu.pt")
    found = cases.gradients(platform, folder, cases.settings(impl, "bfloat16"))
    assert cases.largest_error(found, expected) < cases.BF16_GRADIENTS
    if impl == "local":
        assert cases.largest_error(cases.gradients(platform, folder, cases.settings(impl)), expected) < FLOAT32


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("recipe", ["blockwise", "tensorwise", "delayed", "mxfp8"])
def test_losses_in_fp8_are_close_to_bfloat16(platform, kind, recipe):
    from megatron_pz.models.transformer import RECIPES

    if fault := transformer_engine.fault() or platform.fp8_fault(recipe, RECIPES[recipe][3]):
        pytest.skip(fault)
    plain = cases.settings("transformer_engine", "bfloat16")
    losses, _ = cases.updates(platform, cases.tiny(kind), plain)
    quantized = cases.replace(plain, model=cases.replace(plain.model, fp8=recipe))
    found, _ = cases.updates(platform, cases.tiny(kind), quantized)
    assert found == pytest.approx(losses, rel=0.1, abs=0.02)


@pytest.mark.parametrize("setting", ["weights kept in FP8", "ends in bfloat16"])
def test_losses_in_fp8_are_close_to_bfloat16_by_each_setting(platform, setting):
    if fault := transformer_engine.fault() or platform.fp8_fault("blockwise", (9, 0)):
        pytest.skip(fault)
    hf = cases.tiny("qwen3") | {"num_hidden_layers": 3}  # so that one is between the ends
    plain = cases.settings("transformer_engine", "bfloat16")
    losses, _ = cases.updates(platform, hf, plain)
    model = cases.replace(plain.model, fp8="blockwise", fp8_param_gather=setting == "weights kept in FP8")
    ends = {"first_last_layers_bf16": True} if setting == "ends in bfloat16" else {}
    found, _ = cases.updates(platform, hf, cases.replace(plain, model=model, transformer=plain.transformer | ends))
    assert found == pytest.approx(losses, rel=0.1, abs=0.02)


def test_replayed_experts_give_the_losses_of_the_cpu(platform, impl, tmp_path):
    expected = cases.on_cpu("replay", tmp_path, tmp_path / "cpu.pt")
    config = cases.settings(impl, "bfloat16", routing_replay=True)
    found, _ = cases.updates(platform, cases.tiny("qwen3_moe"), config, replays=True)
    assert found == pytest.approx(expected, rel=0.05, abs=0.02)


def test_a_trainer_that_gave_its_memory_away_learns_the_same_to_the_bit(platform, impl):
    config = cases.settings(impl, "bfloat16")
    awake, rested = (cases.updates(platform, cases.tiny("qwen3"), config, rests=rests) for rests in (False, True))
    assert awake[0] == rested[0]
    assert all(torch.equal(awake[1][name], rested[1][name]) for name in awake[1])


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe mixed"])
def test_checkpoints_go_from_cpu_to_gpu_and_back_bitwise(platform, impl, name, tmp_path):
    folder, config = tmp_path / "hf", cases.settings(impl)
    cases.make(name, folder)
    right = hf_models.tensors(folder)
    cases.on_cpu("save", folder, tmp_path / "of_cpu")
    found = cases.loaded(platform, folder, config, tmp_path / "of_cpu")
    assert all(torch.equal(found[tensor], right[tensor]) for tensor in found)
    cases.saved(platform, folder, config, tmp_path / "of_gpu.checkpoint")
    found = cases.on_cpu("load", folder, tmp_path / "of_gpu.pt")
    assert all(torch.equal(found[tensor], right[tensor]) for tensor in found)


def test_updates_by_the_fused_kernel_are_near_those_by_chunks(platform, impl):
    chunked, _ = cases.updates(platform, cases.tiny("qwen3"), cases.settings(impl, "bfloat16"))
    config = cases.settings(impl, "bfloat16", log_prob_kernel="fused")
    assert cases.updates(platform, cases.tiny("qwen3"), config)[0] == pytest.approx(chunked, rel=0.05, abs=0.02)


def test_an_update_that_is_no_number_changes_no_weight(platform, impl):
    assert cases.nan_step(platform, cases.settings(impl, "bfloat16"))


def test_a_colocated_server_takes_the_weights_after_both_gave_their_memory_away(platform, tmp_path):
    python = os.environ.get("PZ_SERVER_PYTHON", "")
    if not python or subprocess.run([python, "-c", "import sglang"], capture_output=True).returncode:
        pytest.skip("SGLang: set PZ_SERVER_PYTHON to the interpreter of an environment that has it")
    from sglang_models import make_dense

    from megatron_pz.config.schema import CheckpointConfig, EngineConfig, SGLangConfig, TaskConfig
    from megatron_pz.models.folder import read_hf_config
    from megatron_pz.train.engines import make_engine
    from megatron_pz.train.model import build_model

    folder = make_dense(tmp_path / "hf")
    config = cases.replace(
        cases.settings("local", "bfloat16"),
        task=TaskConfig(max_prompt_tokens=64),
        engine=EngineConfig(engine="sglang", max_response_tokens=64),
        checkpoint=CheckpointConfig(run_dir=str(tmp_path)),
        sglang=SGLangConfig(colocate=True, gpus_per_server=1, server_python=python, verify_weights=True),
        server={"mem-fraction-static": 0.3},
    )
    hf = read_hf_config(folder)
    with cases.alone(platform) as parallel:
        from megatron_pz.checkpoint.hf_import import load_hf_weights

        chunks = build_model(hf, config, platform, parallel)
        load_hf_weights(chunks, folder)
        engine = make_engine(config, chunks, parallel, folder, hf, print)
        try:
            for version in range(3):  # `verify_weights` compares every tensor's checksum and a greedy answer
                engine.load(chunks, version)
                assert engine.version == version
                engine.sleep()
                engine.wake()
        finally:
            engine.close()
