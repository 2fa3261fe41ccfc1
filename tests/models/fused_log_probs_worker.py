"""Cases of the fused kernel, run by Triton's interpreter in a process of their own: it must be chosen before Triton is imported.

Prints {case: {quantity: largest difference}} as JSON. `--ranks 2` shares the vocabulary over two processes by gloo.
"""

import json
import os
import sys
import tempfile
from multiprocessing import get_context

os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.distributed as dist
from torch.distributions import Categorical

from megatron_pz.models.logprobs import token_log_probs

PADDED, HIDDEN, TOKENS = 320, 40, 19  # blocks are 16 tokens, 64 rows and 32 columns: no size is a multiple but PADDED
CASES = {
    "float32": (torch.float32, 300, 1.0),
    "float32, temperature 0.7": (torch.float32, 300, 0.7),
    "bfloat16": (torch.bfloat16, 300, 1.0),
    "no padding": (torch.float32, 320, 1.0),
    "a vocabulary within one block": (torch.float32, 33, 1.0),
}


def inputs(dtype=torch.float32, vocab_size=300, tokens=TOKENS):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    weight = torch.randn(PADDED, HIDDEN, generator=generator).to(dtype)
    labels = torch.randint(0, vocab_size, (tokens,), generator=generator)
    labels[::3] = -1
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def run(hidden, weight, labels, vocab_size=300, temperature=1.0, **more):
    """Log-probs, entropies and both gradients."""
    log_probs, entropy = token_log_probs(
        hidden, weight, labels, temperature=temperature, vocab_size=vocab_size, chunk_tokens=4, **more
    )
    assert not entropy.requires_grad
    factors = torch.arange(1.0, len(labels) + 1)
    grads = torch.autograd.grad((log_probs * factors).sum(), (hidden, weight))
    return [log_probs.detach(), entropy, *grads]


def reference(hidden, weight, labels, vocab_size, temperature):
    """The same by torch.distributions in float64, of the same (rounded) inputs."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    spread = Categorical(logits=(hidden @ weight.t())[:, :vocab_size] / temperature)
    wanted = labels >= 0
    log_probs = torch.where(wanted, spread.log_prob(labels.clamp(min=0)), 0.0)
    grads = torch.autograd.grad((log_probs * torch.arange(1.0, len(labels) + 1)).sum(), (hidden, weight))
    return [log_probs.detach(), torch.where(wanted, spread.entropy(), 0.0).detach(), *grads]


def differences(found, wanted):
    """Largest; of the gradients as a share of their largest number."""
    gaps = [
        (a.double() - b.double()).abs().max().item() if a.numel() else 0.0 for a, b in zip(found, wanted, strict=True)
    ]
    scale = [b.double().abs().max().item() or 1.0 for b in wanted[2:]]
    gaps = [*gaps[:2], gaps[2] / scale[0], gaps[3] / scale[1]]
    return dict(zip(("log_probs", "entropy", "grad_hidden", "grad_weight"), gaps, strict=True))


def alone():
    results = {}
    for name, (dtype, vocab_size, temperature) in CASES.items():
        given = inputs(dtype, vocab_size)
        found = run(*given, vocab_size, temperature, kernel="fused")
        results[name] = differences(found, reference(*given, vocab_size, temperature))
        results[name]["of padding"] = found[3][vocab_size:].double().abs().sum().item()
        results[name]["of unwanted"] = sum(x[::3].double().abs().sum().item() for x in found[:3])
        results[name]["to chunked"] = max(differences(found, run(*given, vocab_size, temperature)).values())
    given = inputs()
    twice = [run(*given, kernel="fused") for _ in range(2)]
    results["twice"] = differences(*twice)
    told = run(*given, kernel="fused", wanted=(given[2] >= 0).nonzero().squeeze(1))
    results["places given"] = differences(told, twice[0])
    nobody = inputs()
    nobody[2].fill_(-1)
    results["nothing wanted"] = {"sum": sum(x.abs().sum().item() for x in run(*nobody, kernel="fused"))}
    empty = run(*inputs(tokens=0), kernel="fused")
    results["no tokens"] = {"sum": sum(x.abs().sum().item() for x in empty), "tokens": float(empty[0].numel())}
    broken = inputs()
    with torch.no_grad():
        broken[0][1, 3] = torch.nan
    found = run(*broken, kernel="fused")[0]
    results["a NaN"] = {"at its token": float(found[1].isnan()), "elsewhere": float(found[2:].isnan().sum())}
    return results


def _rank(rank, ranks, store, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    results = {}
    for vocab_size in (320, 300, 160, 70):  # the second rank's 160 rows: whole, partly padding, padding only twice
        hidden, weight, labels = inputs(vocab_size=vocab_size)
        one = run(hidden, weight, labels, vocab_size, 0.7, kernel="fused")
        part = weight.detach().chunk(ranks)[rank].clone().requires_grad_()
        two = run(hidden, part, labels, vocab_size, 0.7, kernel="fused", tp_group=dist.group.WORLD)
        dist.all_reduce(two[2])
        one[3] = one[3].chunk(ranks)[rank]
        results[f"vocab {vocab_size}"] = differences(two, one)
    queue.put(results)
    dist.destroy_process_group()


def shared(ranks):
    with tempfile.TemporaryDirectory() as folder:
        context = get_context("spawn")
        queue = context.SimpleQueue()
        processes = [
            context.Process(target=_rank, args=(rank, ranks, f"{folder}/store", queue)) for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            assert process.exitcode == 0
        return {f"rank {rank}": queue.get() for rank in range(ranks)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(shared(2) if "--ranks" in sys.argv else alone()))
