"""No host synchronisation inside a micro-batch, counted by torch's profiler on a GPU: of the head and the objective, and of the whole.

On a CPU: tests/train/test_host_waits.py and, with Transformer Engine's layers, tests/models/test_transformer_engine_layers.py.
"""

import sys
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent))

import cases

from megatron_pz.models.logprobs import token_log_probs
from megatron_pz.platform import transformer_engine
from megatron_pz.platform.select import select_platform
from megatron_pz.train.loss import importance_weights, policy_loss, token_sums

pytestmark = pytest.mark.gpu
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def micro_batch(tokens=512, hidden_size=576, vocab_size=49152):
    hidden = torch.randn(tokens, hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab_size, hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, vocab_size, (tokens,))
    labels[::4] = -1
    wanted = (labels >= 0).nonzero().squeeze(1).cuda()
    numbers = torch.zeros(tokens, device="cuda")
    return hidden, weight, labels.cuda(), wanted, numbers


def forward_backward(hidden, weight, labels, wanted, numbers):
    """As the last stage and `Trainer.objective` do it."""
    log_probs, entropy = token_log_probs(
        hidden, weight, labels, vocab_size=weight.shape[0], chunk_tokens=256, wanted=wanted, kernel="fused"
    )
    weights = (labels >= 0).float()
    importance, _ = importance_weights(log_probs.detach(), numbers, weights, mode="truncated", cap=2.0)
    loss, stats = policy_loss(
        log_probs, log_probs.detach(), weights, weights, eps_clip=0.2, eps_clip_high=0.3, importance=importance
    )
    stats |= token_sums(log_probs.detach(), numbers, entropy, weights, labels >= 0)
    loss.backward()
    return stats


def test_the_head_and_the_objective_never_wait():
    given = micro_batch()
    forward_backward(*given)  # compiles and chooses tiles, which waits
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        forward_backward(*given)
    names = [event.name for event in profiled.events()]
    torch.cuda.synchronize()
    # The profiler itself waits once when it ends.
    assert sum(names.count(name) for name in WAITS) <= 1, {name: names.count(name) for name in WAITS}
    assert not [name for name in names if name.startswith("Memcpy DtoH")]


def test_torch_itself_raises_nothing_about_a_wait():
    given = micro_batch()
    forward_backward(*given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_backward(*given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("kind", "waits"), [("qwen3", 0), ("qwen3_moe", hf_models.SMALL["num_hidden_layers"])])
def test_transformer_engine_s_layers_wait_once_a_layer_of_experts(monkeypatch, kind, waits):
    """For the tokens of each expert, by which its grouped products are told their sizes."""
    platform = select_platform("cuda")
    if fault := transformer_engine.fault():
        pytest.skip(fault)
    from megatron_pz.train import step as step_module

    counts: list[dict[str, int]] = []
    real = step_module.run_schedule

    def watched(*args: Any, **kwargs: Any) -> Any:
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            result = real(*args, **kwargs)
        names = [event.name for event in profiled.events()]
        counts.append({name: names.count(name) for name in WAITS})
        return result

    monkeypatch.setattr(step_module, "run_schedule", watched)
    cases.updates(platform, cases.tiny(kind), cases.settings("transformer_engine", "bfloat16"))
    # Of the third update, all kernels compiled. The profiler waits once when it ends, Megatron once for the number of tokens.
    assert sum(counts[-1].values()) <= 2 + waits, counts[-1]
