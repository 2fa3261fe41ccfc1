"""No host synchronisation inside the head and the objective of a micro-batch, counted by torch's profiler on a GPU.

Its twin on a CPU, tests/train/test_host_waits.py, watches a whole update of the trainer.
"""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from megatron_pz.models.logprobs import token_log_probs
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
