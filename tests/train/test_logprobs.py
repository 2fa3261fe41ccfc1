"""The invariants of models/logprobs.py, against float64 by torch.distributions. Tensor-parallel: test_layouts.py."""

import pytest
import torch
from torch.distributions import Categorical
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_pz.models.logprobs import token_log_probs

VOCAB, PADDED, HIDDEN, TOKENS = 11, 16, 6, 9


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(PADDED, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def ours(hidden, weight, labels, temperature=1.0, chunk_tokens=4):
    return token_log_probs(hidden, weight, labels, temperature=temperature, vocab_size=VOCAB, chunk_tokens=chunk_tokens)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_log_probs_entropy_and_gradients_are_the_reference_s(temperature):
    hidden, weight, labels = inputs()
    log_probs, entropy = ours(hidden, weight, labels, temperature)
    factors = torch.arange(1.0, TOKENS + 1, dtype=torch.float64)
    grads = torch.autograd.grad((log_probs * factors).sum(), (hidden, weight))

    reference = Categorical(logits=(hidden @ weight.t())[:, :VOCAB] / temperature)
    wanted = torch.autograd.grad((reference.log_prob(labels) * factors).sum(), (hidden, weight))

    close = {"rtol": 0, "atol": 1e-13}  # float64
    torch.testing.assert_close(log_probs, reference.log_prob(labels), **close)
    torch.testing.assert_close(entropy, reference.entropy(), **close)
    torch.testing.assert_close(grads, wanted, **close)


def test_gradients_agree_with_finite_differences():
    hidden, weight, labels = inputs()
    assert torch.autograd.gradcheck(lambda h, w: ours(h, w, labels, 0.7)[0], (hidden, weight))


def test_the_entropy_has_no_gradient():
    hidden, weight, labels = inputs()
    assert not ours(hidden, weight, labels)[1].requires_grad


def test_chunks_do_not_change_the_result():
    hidden, weight, labels = inputs()
    whole = ours(hidden, weight, labels, chunk_tokens=100)
    for chunk_tokens in (1, 2, TOKENS):
        torch.testing.assert_close(ours(hidden, weight, labels, chunk_tokens=chunk_tokens), whole, rtol=0, atol=1e-14)


def test_rows_of_padding_have_no_influence_and_no_gradient():
    hidden, weight, labels = inputs()
    before = ours(hidden, weight, labels)[0]
    loud = weight.detach().clone()
    loud[VOCAB:] = 1e3
    loud.requires_grad_()
    after = ours(hidden, loud, labels)[0]
    after.sum().backward()
    assert torch.equal(before, after)
    assert not loud.grad[VOCAB:].any()
    assert loud.grad[:VOCAB].any()


def test_tokens_that_are_not_wanted_are_zero_and_teach_nothing():
    hidden, weight, labels = inputs()
    some = labels.clone()
    some[[0, 3, 8]] = -1
    log_probs, entropy = ours(hidden, weight, some)
    wanted = some >= 0
    torch.testing.assert_close(log_probs[wanted], ours(hidden, weight, labels)[0][wanted], rtol=0, atol=1e-14)
    assert not log_probs[~wanted].any()
    assert not entropy[~wanted].any()
    log_probs.sum().backward()
    assert not hidden.grad[~wanted].any()


def test_where_no_token_is_wanted_the_gradient_is_zero_and_not_missing():
    # A rank without a trained token still takes part in every reduction of its gradients.
    hidden, weight, labels = inputs()
    ours(hidden, weight, torch.full_like(labels, -1))[0].sum().backward()
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_large_logits_do_not_overflow():
    hidden, weight, labels = inputs(torch.float32)
    log_probs, entropy = ours(1e4 * hidden, weight, labels)
    assert torch.isfinite(log_probs).all()
    assert torch.isfinite(entropy).all()


def test_bfloat16_gives_float32_log_probs_and_gradients_in_the_dtype_of_the_weights():
    hidden, weight, labels = inputs(torch.bfloat16)
    log_probs, entropy = ours(hidden, weight, labels)
    log_probs.sum().backward()
    exact = Categorical(logits=(hidden.double() @ weight.double().t())[:, :VOCAB])
    assert (log_probs.dtype, entropy.dtype) == (torch.float32, torch.float32)
    assert (hidden.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    # Logits leave the product in bfloat16: 8 bits, of values up to 8.
    torch.testing.assert_close(log_probs.double(), exact.log_prob(labels), rtol=0, atol=0.05)


def test_a_temperature_of_zero_is_refused():
    hidden, weight, labels = inputs()
    with pytest.raises(ValueError, match=r"temperature is 0\.0"):
        ours(hidden, weight, labels, temperature=0.0)


class LiveBytes(TorchDispatchMode):
    """Counts, after each operation, the bytes of all tensors that came into being within and still exist."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in given:
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def _peak_bytes(chunk_tokens: int) -> int:
    """Of forward and backward over 512 tokens and 4096 rows: [T, V] in float32 is 8 MiB."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(512, 16, generator=generator).requires_grad_()
    weight = torch.randn(4096, 16, generator=generator).requires_grad_()
    labels = torch.randint(0, 4096, (512,), generator=generator)
    with LiveBytes() as live:
        log_probs, _ = token_log_probs(hidden, weight, labels, vocab_size=4096, chunk_tokens=chunk_tokens)
        log_probs.sum().backward()
    return live.peak


def test_the_logits_of_all_tokens_are_never_held_measured():
    whole, in_chunks, at_once = 512 * 4096 * 4, _peak_bytes(16), _peak_bytes(512)
    print(
        f"peak: {in_chunks / 2**20:.2f} MiB in chunks of 16, {at_once / 2**20:.2f} at once, [T, V] {whole / 2**20:.0f}"
    )
    assert at_once > whole  # the measure would see them
    # Two or three pieces of [16, V] (256 KiB each), the weight's gradient (256 KiB) and rows of tokens.
    assert in_chunks < whole / 6
