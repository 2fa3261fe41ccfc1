"""The fused kernels on a GPU, at the sizes of real models, against float64 a chunk of tokens at a time.

Tolerances: log-probs 2e-3 (float32 sums of 2560 products of bfloat16, values up to 20); gradients 1e-2 of their norm (bfloat16).
"""

import pytest
import torch

from megatron_pz.models.logprobs import token_log_probs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("width", "rows", "tokens"), [(576, 49152, 1000), (2560, 151936, 2049), (4096, 128256, 300)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_log_probs_entropies_and_gradients_are_the_reference_s(width, rows, tokens, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(tokens, width, device="cuda", generator=generator).to(dtype).requires_grad_()
    weight = (0.02 * torch.randn(rows, width, device="cuda", generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(0, rows - 5, (tokens,), device="cuda", generator=generator)
    labels[::7] = -1
    found, exact = [], []
    for fused, results in ((True, found), (False, exact)):
        inputs = (
            (hidden, weight)
            if fused
            else (hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_())
        )
        log_probs, entropy = token_log_probs(
            *inputs, labels, temperature=0.8, vocab_size=rows - 5, chunk_tokens=256, fused=fused
        )
        results += [log_probs.detach(), entropy, *torch.autograd.grad(log_probs.sum(), inputs)]
    for ours, wanted in zip(found[:2], exact[:2], strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=0, atol=2e-3)
    for ours, wanted in zip(found[2:], exact[2:], strict=True):
        assert float((ours.double() - wanted).norm() / wanted.norm()) < (1e-2 if dtype is torch.bfloat16 else 1e-4)
