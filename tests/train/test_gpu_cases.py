"""What the GPU tests compute (tests/gpu/cases.py), on the CPU in float32: that it runs, and that its comparisons can fail."""

import sys
from pathlib import Path

import hf_models
import pytest
import torch

from megatron_pz.platform.select import select_platform

PLATFORM = select_platform("cpu")
sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))

import cases  # noqa: E402


def test_logits_are_compared(tmp_path):
    folder = tmp_path / "hf"
    assert cases.logits_error(PLATFORM, "smollm3", folder, cases.settings()) < 1e-5
    assert 1e-5 < cases.logits_error(PLATFORM, "smollm3", folder, cases.settings(dtype="bfloat16")) < 3e-2


@pytest.mark.parametrize("name", ["qwen3", "smollm3", "qwen3_moe"])
def test_gradients_in_bfloat16_are_near_those_in_float32_and_a_wrong_sign_is_not(name, tmp_path):
    folder = tmp_path / "hf"
    cases.make(name, folder)
    exact = cases.gradients(PLATFORM, cases.calm(folder), cases.settings())
    rounded = cases.gradients(PLATFORM, folder, cases.settings(dtype="bfloat16"))
    assert 1e-3 < cases.largest_error(rounded, exact) < cases.BF16_GRADIENTS
    largest = max(exact, key=lambda name: float(exact[name].norm()))
    assert cases.largest_error(rounded | {largest: -rounded[largest]}, exact) > cases.BF16_GRADIENTS


def test_gradients_come_from_another_process(tmp_path):
    folder = tmp_path / "hf"
    cases.make("smollm3", folder)
    here = cases.gradients(PLATFORM, folder, cases.settings())
    elsewhere = cases.on_cpu("gradients", folder, tmp_path / "a.pt")
    assert cases.largest_error(here, elsewhere) < 1e-6
    name = next(iter(here))
    assert cases.largest_error(here | {name: -here[name]}, elsewhere) > 1e-2


def test_updates_replay_experts_and_rest_without_a_trace():
    config = cases.settings(routing_replay=True)
    own, _ = cases.updates(PLATFORM, cases.tiny("qwen3_moe"), config)
    replayed, awake = cases.updates(PLATFORM, cases.tiny("qwen3_moe"), config, replays=True)
    _, rested = cases.updates(PLATFORM, cases.tiny("qwen3_moe"), config, replays=True, rests=True)
    assert replayed != pytest.approx(own, rel=1e-4)
    assert all(torch.equal(awake[name], rested[name]) for name in awake)


def test_an_update_that_is_no_number_is_refused():
    assert cases.nan_step(PLATFORM, cases.settings())


def test_a_checkpoint_is_read_in_another_process(tmp_path):
    folder = tmp_path / "hf"
    cases.make("qwen3", folder)
    cases.saved(PLATFORM, folder, cases.settings(), tmp_path / "own.checkpoint")
    found = cases.on_cpu("load", folder, tmp_path / "own.pt")
    right = hf_models.tensors(folder)
    assert found and all(torch.equal(found[name], right[name]) for name in found)
