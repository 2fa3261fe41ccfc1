"""The fused log-probs at real sizes in bfloat16, against float64 on the same inputs; time is no matter here (benchmarks/gpu)."""

import pytest
import torch

from megatron_pz.models.logprobs import token_log_probs

pytestmark = pytest.mark.gpu
UNIT = 2.0**-8
"""bfloat16's: what one rounding may change, as a share."""


def inputs(tokens, hidden_size, vocab_size, padded, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, generator=generator, device="cuda").to(dtype)
    weight = (torch.randn(padded, hidden_size, generator=generator, device="cuda") * hidden_size**-0.5 * 3).to(dtype)
    labels = torch.randint(0, vocab_size, (tokens,), generator=generator, device="cuda")
    labels[::5] = -1
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def run(hidden, weight, labels, vocab_size, temperature, kernel):
    log_probs, entropy = token_log_probs(
        hidden, weight, labels, temperature=temperature, vocab_size=vocab_size, chunk_tokens=256, kernel=kernel
    )
    factors = torch.linspace(-1.0, 1.0, len(labels), device="cuda", dtype=log_probs.dtype)
    grads = torch.autograd.grad((log_probs * factors).sum(), (hidden, weight))
    return [log_probs.detach(), entropy, *grads]


def exact(x):
    return x.detach().double().requires_grad_()


@pytest.mark.parametrize(
    ("tokens", "hidden_size", "vocab_size"),
    [(1000, 576, 49152), (777, 2048, 151936), (513, 2560, 151936), (300, 4096, 128256), (1, 576, 49152)],
)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_bfloat16_agrees_with_float64(tokens, hidden_size, vocab_size, temperature):
    hidden, weight, labels = inputs(tokens, hidden_size, vocab_size, vocab_size + 128)
    found = run(hidden, weight, labels, vocab_size, temperature, "fused")
    wanted = run(exact(hidden), exact(weight), labels, vocab_size, temperature, "chunked")
    for a, b in zip(found[:2], wanted[:2], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-4)  # float32 sums of up to 4096 products
    for a, b in zip(found[2:], wanted[2:], strict=True):
        gap, size = (a.double() - b).norm().item(), b.norm().item()
        assert gap <= 2 * UNIT * size + 1e-12, f"{gap:g} of {size:g}"
    assert found[3][vocab_size:].abs().max().item() == 0
    assert all(x[::5].abs().max().item() == 0 for x in found[:3])


def test_float32_agrees_with_float64():
    hidden, weight, labels = inputs(300, 2048, 49152, 49280, torch.float32)
    found = run(hidden, weight, labels, 49152, 1.0, "fused")
    wanted = run(exact(hidden), exact(weight), labels, 49152, 1.0, "chunked")
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_the_same_inputs_give_the_same_bits():
    hidden, weight, labels = inputs(1000, 2560, 151936, 151936)
    one, two = (run(hidden, weight, labels, 151936, 1.0, "fused") for _ in range(2))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


def test_places_beyond_two_to_the_31_are_reached():
    """16384 tokens by 151936 rows are 2.5e9 logits, none of which is kept: little beyond inputs and gradients is taken."""
    hidden, weight, labels = inputs(16384, 576, 151936, 151936)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = run(hidden, weight, labels, 151936, 1.0, "fused")
    taken = torch.cuda.max_memory_allocated() - before
    assert taken < 1 << 30, f"{taken / 2**20:.0f} MiB; the logits in float32 would be 9496"
    tail = slice(16300, 16384)
    alone = run(hidden[tail].detach().requires_grad_(), weight, labels[tail], 151936, 1.0, "fused")
    for a, b in zip(found[:2], alone[:2], strict=True):
        torch.testing.assert_close(a[tail], b, rtol=0, atol=1e-4)
