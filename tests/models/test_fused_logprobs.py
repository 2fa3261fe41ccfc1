"""The fused kernels in Triton's interpreter, against float64. On a GPU: tests/gpu/test_logprobs.py.

Tolerances: log-probs and entropies 5e-6 (float32 sums of 70 products; seen 1.7e-6); gradients relative to their norm, float32 5e-7
(seen 3.5e-7), bfloat16 6e-3, the rounding of gradients and of a tile's [T, V] themselves (seen 3.8e-3).
"""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import triton
from torch.distributions import Categorical

from megatron_pz.errors import ConfigError
from megatron_pz.models import fused_logprobs
from megatron_pz.models.logprobs import token_log_probs

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="a GPU is here: tests/gpu has these on it")

TOKENS, HIDDEN, VOCAB, PADDED = 13, 70, 300, 320  # of none of them a tile's size is a divisor
GRADIENT = {torch.float32: 5e-7, torch.bfloat16: 6e-3}


def inputs(dtype, padded=PADDED):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype)
    weight = (0.3 * torch.randn(padded, HIDDEN, generator=generator)).to(dtype)
    weight[VOCAB:] = 50.0  # padding that would drown everything
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    labels[[2, 9]] = -1
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def ours(hidden, weight, labels, temperature=0.7, **more):
    return token_log_probs(
        hidden, weight, labels, temperature=temperature, vocab_size=VOCAB, chunk_tokens=4, fused=True, **more
    )


FACTORS = torch.arange(1.0, TOKENS + 1)


def reference(hidden, weight, labels, temperature=0.7):
    """(log-probs, entropies, gradients) in float64; 0 where nothing is wanted."""
    hidden, weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    wanted = labels >= 0
    exact = Categorical(logits=(hidden @ weight[:VOCAB].t()) / temperature)
    log_probs = torch.where(wanted, exact.log_prob(labels.clamp(min=0)), 0.0)
    gradients = torch.autograd.grad((log_probs * FACTORS).sum(), (hidden, weight))
    return log_probs.detach(), torch.where(wanted, exact.entropy(), 0.0).detach(), gradients


def off(found, wanted):
    return ((found.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile_rows", [8192, 100])
def test_log_probs_entropies_and_gradients_are_the_reference_s(monkeypatch, dtype, tile_rows):
    monkeypatch.setattr(fused_logprobs, "TILE_ROWS", tile_rows)
    hidden, weight, labels = inputs(dtype)
    log_probs, entropy = ours(hidden, weight, labels)
    assert log_probs.dtype is torch.float32 and not entropy.requires_grad
    gradients = torch.autograd.grad((log_probs * FACTORS).sum(), (hidden, weight))
    wanted_log_probs, wanted_entropy, wanted_gradients = reference(hidden, weight, labels)
    torch.testing.assert_close(log_probs.double(), wanted_log_probs, rtol=0, atol=5e-6)
    torch.testing.assert_close(entropy.double(), wanted_entropy, rtol=0, atol=5e-6)
    for found, wanted in zip(gradients, wanted_gradients, strict=True):
        assert found.dtype is dtype and off(found, wanted) < GRADIENT[dtype]
    assert not gradients[1][VOCAB:].any() and not gradients[0][labels < 0].any()


def test_places_that_the_caller_knows_give_the_same():
    hidden, weight, labels = inputs(torch.float32)
    known = ours(hidden, weight, labels, wanted=(labels >= 0).nonzero().squeeze(1))
    assert all(map(torch.equal, known, ours(hidden, weight, labels)))


def test_large_logits_do_not_overflow_and_small_differences_are_kept():
    hidden, weight, labels = inputs(torch.float32)
    log_probs, entropy = ours(hidden * 1e4, weight, labels)
    assert torch.isfinite(log_probs).all() and torch.isfinite(entropy).all()


def test_where_no_token_is_wanted_the_gradient_is_zero_and_not_missing():
    hidden, weight, labels = inputs(torch.float32)
    ours(hidden, weight, torch.full_like(labels, -1))[0].sum().backward()
    assert not hidden.grad.any() and not weight.grad.any()


def test_equal_inputs_give_equal_bits():
    hidden, weight, labels = inputs(torch.bfloat16)
    first, second = (torch.autograd.grad(ours(hidden, weight, labels)[0].sum(), (hidden, weight)) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_float64_is_left_to_the_chunked_one():
    hidden, weight, labels = inputs(torch.float64)
    wanted, _, _ = reference(hidden, weight, labels)
    torch.testing.assert_close(ours(hidden, weight, labels)[0].detach(), wanted, rtol=0, atol=1e-13)


def test_on_a_cpu_without_the_interpreter_it_is_refused(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ConfigError, match=r"'fused' on a CPU.*TRITON_INTERPRET=1"):
        fused_logprobs.check_available(torch.device("cpu"))


def _rank(rank, ranks, store, padded, folder):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    hidden, weight, labels = inputs(torch.float32, padded)
    share = padded // ranks
    own = weight.detach()[rank * share : (rank + 1) * share].clone().requires_grad_()
    log_probs, entropy = ours(hidden, own, labels, tp_group=dist.group.WORLD)
    (log_probs * FACTORS).sum().backward()
    dist.all_reduce(hidden.grad)  # what the caller's copy to the region does
    torch.save((log_probs.detach(), entropy, hidden.grad, own.grad), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("padded", [320, 640])
def test_ranks_that_share_the_vocabulary_have_what_one_has(tmp_path, padded):
    """With 320 rows the second rank has 20 of padding, with 640 nothing else."""
    hidden, weight, labels = inputs(torch.float32, padded)
    wanted_log_probs, wanted_entropy, (wanted_hidden, wanted_weight) = reference(hidden, weight, labels)
    folder = tmp_path / "found"
    folder.mkdir()
    mp.spawn(_rank, (2, tmp_path / "store", padded, folder), nprocs=2)
    found = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    for log_probs, entropy, grad_hidden, _ in found:
        torch.testing.assert_close(log_probs.double(), wanted_log_probs, rtol=0, atol=5e-6)
        torch.testing.assert_close(entropy.double(), wanted_entropy, rtol=0, atol=5e-6)
        assert off(grad_hidden, wanted_hidden) < GRADIENT[torch.float32]
    assert off(torch.cat([part[3] for part in found]), wanted_weight) < GRADIENT[torch.float32]
