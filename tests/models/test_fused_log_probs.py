"""The fused kernel by Triton's interpreter, against float64, the chunked version and itself. On a GPU: tests/gpu/."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_pz.errors import ConfigError
from megatron_pz.models.logprobs import chosen_kernel

HERE = Path(__file__).parent
CPU, CUDA, META = torch.device("cpu"), torch.device("cuda"), torch.device("meta")


def worker(*arguments, script="fused_log_probs_worker.py"):
    run = subprocess.run(
        [sys.executable, HERE / script, *arguments],
        env=os.environ | {"PYTHONPATH": str(HERE.parents[1])},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def found():
    return worker()


@pytest.mark.parametrize("case", ["float32", "float32, temperature 0.7", "no padding", "a vocabulary within one block"])
def test_float32_agrees_with_float64_and_with_the_chunked_version(found, case):
    # Logits of 40 products reach 25; log-probs are differences of such, gradients shares of their largest.
    assert found[case]["log_probs"] < 3e-5 and found[case]["entropy"] < 3e-5
    assert found[case]["grad_hidden"] < 1e-5 and found[case]["grad_weight"] < 1e-5
    assert found[case]["to chunked"] < 3e-5


def test_bfloat16_inputs_have_float32_log_probs_and_gradients_rounded_once_or_twice(found):
    # 2^-8 is bfloat16's unit: the gradient of the logits is rounded, and so is the result.
    assert found["bfloat16"]["log_probs"] < 3e-5 and found["bfloat16"]["entropy"] < 3e-5
    assert found["bfloat16"]["grad_hidden"] < 2e-2 and found["bfloat16"]["grad_weight"] < 2e-2


@pytest.mark.parametrize("what", ["of padding", "of unwanted"])
def test_padding_rows_and_unwanted_tokens_get_exactly_nothing(found, what):
    assert {case: values[what] for case, values in found.items() if what in values and values[what] != 0} == {}


def test_the_same_inputs_give_the_same_bits_and_places_from_the_host_change_nothing(found):
    assert set(found["twice"].values()) == {0.0} and set(found["places given"].values()) == {0.0}


def test_no_tokens_and_no_wanted_tokens_are_zeros(found):
    assert found["nothing wanted"] == {"sum": 0.0} and found["no tokens"] == {"sum": 0.0, "tokens": 0.0}


def test_a_number_that_is_none_shows_at_its_token_only(found):
    assert found["a NaN"] == {"at its token": 1.0, "elsewhere": 0.0}


def test_two_ranks_share_a_vocabulary_also_where_one_holds_padding_only():
    results = worker("--ranks", "2")
    assert set(results) == {"rank 0", "rank 1"}
    for cases in results.values():
        assert set(cases) == {"vocab 320", "vocab 300", "vocab 160", "vocab 70"}
        assert max(value for case in cases.values() for value in case.values()) < 3e-5  # float32, as above


def test_the_kernels_compile_for_hopper_with_its_tensor_cores():
    """Without a GPU. 227 KiB is what a block of an H100 or H200 may have of shared memory."""
    compiled = worker(script="compiled_log_probs_worker.py")
    assert [name.split()[:2] for name in compiled] == [
        ["forward", "bf16"],
        ["gradient", "bf16"],
        ["forward", "fp32"],
        ["gradient", "fp32"],
    ]
    assert all(found["shared"] <= 227 * 1024 for found in compiled.values())
    assert {name: found["wgmma"] for name, found in compiled.items() if "bf16" in name and not found["wgmma"]} == {}


def test_auto_is_fused_on_cuda_and_chunked_elsewhere_and_in_float64():
    assert chosen_kernel("auto", CUDA, torch.bfloat16) == "fused"
    assert chosen_kernel("auto", CUDA, torch.float64) == "chunked"
    assert chosen_kernel("auto", CPU, torch.bfloat16) == chosen_kernel("auto", META, torch.bfloat16) == "chunked"
    assert chosen_kernel("chunked", CUDA, torch.bfloat16) == "chunked"
    assert chosen_kernel("fused", META, torch.bfloat16) == "fused"


def test_fused_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match='"fused", but weights are torch.float32 on cpu.*Use "auto"'):
        chosen_kernel("fused", CPU, torch.float32)
    with pytest.raises(ConfigError, match="float64 on cuda"):
        chosen_kernel("fused", CUDA, torch.float64)
