"""What the real Transformer Engine compiles for a GPU, in plain torch, so that all of its Python runs on a CPU.

    import fake_engine_kernels          # instead of importing transformer_engine first
    fake_engine_kernels.install()

Replaced are the functions of its torch extension that its layers and its Adam call (`NAMES`, those of attention and FP8 beside it),
and its question whether there is a GPU. Its permutation of tokens to experts is Triton code, which `TRITON_INTERPRET=1` interprets.
For a process of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import fake_engine_attention as attention
import fake_engine_fp8 as fp8
import torch
import transformer_engine.pytorch  # noqa: F401  # loads its extension
import transformer_engine_torch as extension
from torch import Tensor
from transformer_engine.pytorch.constants import TE_DType

CALLED: set[str] = set()
"""Names of the functions that ran."""
_DTYPES = {value: key for key, value in TE_DType.items()}
_HOPPER = SimpleNamespace(major=9, minor=0, multi_processor_count=132)


def _product(a: Any, transa: bool, b: Any, transb: bool) -> Tensor:
    """Of two matrices as BLAS has them, column by column: rows of B by those of A. In FP8 each is read along the sum alone."""
    rows = b.size()[-1] if transb else b.size()[:-1].numel()
    left, right = fp8.operand(b, transb, "B", rows), fp8.operand(a, not transa, "A", rows)
    return (left.T if transb else left) @ (right.T if transa else right)


def generic_gemm(
    a, transa, b, transb, out, quantizer, out_dtype, bias, bias_dtype, gelu, gelu_in, grad, workspace, size, accumulate,
    split, *, comm_overlap=None, alpha=1.0, **_,
):  # fmt: skip
    assert quantizer is None and bias is None and not gelu and comm_overlap is None
    found = alpha * _product(a, transa, b, transb)
    if out is not None:
        return out.add_(found) if accumulate else out.copy_(found), None, None, None
    shape = found.shape if transb else (*b.size()[:-1], found.shape[-1])
    return found.reshape(shape).to(a.dtype if out_dtype is None else _DTYPES[out_dtype]), None, None, None


def te_general_grouped_gemm(
    a, transa, b, transb, out, out_dtype, m_splits, bias, bias_dtype, single_output, gelu, grad, workspaces, size, accumulate, *_
):  # fmt: skip
    outs = out[0].split(m_splits) if single_output else out
    for left, right, into in zip(a, b, outs, strict=True):
        found = _product(left, transa, right, transb)  # of no tokens: zeros, or nothing
        _ = into.add_(found) if accumulate else into.copy_(found)
    return bias


def rmsnorm_fwd(x, weight, eps, out, quantizer, out_dtype, sm_margin, zero_centered_gamma):
    assert not zero_centered_gamma
    scale = torch.rsqrt(x.float().square().mean(-1) + eps)
    found = (x.float() * scale[..., None] * weight.float()).to(_DTYPES[out_dtype])
    if quantizer is not None:
        return fp8.quantize(found, quantizer, out), None, scale
    return found if out is None else out.copy_(found), None, scale


def rmsnorm_bwd(dz, x, scale, weight, sm_margin, zero_centered_gamma):
    normed, dy = x.float() * scale[..., None], dz.float() * weight.float()
    dx = scale[..., None] * (dy - normed * (dy * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype), (dz.float() * normed).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)


def _turned(t: Tensor, freqs: Tensor, sign: int) -> Tensor:
    one, two = t.float().chunk(2, -1)
    return (t.float() * freqs.cos() + sign * torch.cat([-two, one], -1) * freqs.sin()).to(t.dtype)


def _rope(sign: int) -> Callable[..., Tensor]:
    def rope(t, freqs, start_positions, form, interleaved, cu_seqlens, cp_size, cp_rank):
        assert start_positions is None and not interleaved
        if form == extension.NVTE_QKV_Format.NVTE_SBHD:
            return _turned(t, freqs[: len(t)], sign)
        assert form == extension.NVTE_QKV_Format.NVTE_THD
        # Of each sequence a rank of context parallelism has two pieces, as far from the start as from the end.
        found = []
        for part in attention.parts(t, cu_seqlens // cp_size):
            half, last = len(part) // 2, 2 * cp_size - cp_rank - 1
            places = torch.cat([torch.arange(half) + cp_rank * half, torch.arange(half) + last * half])
            found.append(_turned(part, freqs[places if cp_size > 1 else torch.arange(len(part)), 0], sign))
        return torch.cat(found)

    return rope


def multi_tensor_adam(chunk, flag, lists, lr, beta1, beta2, eps, step, adam_w, bias_correction, weight_decay):
    assert adam_w == 1 and bias_correction == 1 and len(lists) == 4, len(lists)
    for gradient, parameter, mean, square in zip(*lists, strict=True):
        mean.lerp_(gradient.float(), 1 - beta1)
        square.mul_(beta2).addcmul_(gradient.float(), gradient.float(), value=1 - beta2)
        ratio = mean / (1 - beta1**step) / ((square / (1 - beta2**step)).sqrt() + eps)
        parameter.sub_(lr * (ratio + weight_decay * parameter.float()))


def multi_tensor_l2norm(chunk, flag, lists, per_tensor=False):
    norms = torch.stack([x.float().norm() for x in lists[0]])
    return norms.norm()[None], norms if per_tensor else torch.zeros(1)


def multi_tensor_scale(chunk, flag, lists, scale):
    for source, target in zip(*lists, strict=True):
        target.copy_(scale * source.float())


fused_rope_forward, fused_rope_backward = _rope(1), _rope(-1)
NAMES = (
    "generic_gemm", "te_general_grouped_gemm", "rmsnorm_fwd", "rmsnorm_bwd", "fused_rope_forward", "fused_rope_backward",
    "multi_tensor_adam", "multi_tensor_l2norm", "multi_tensor_scale",
)  # fmt: skip


def _told(name: str) -> Callable[..., Any]:
    """The function of this name here; that it ran is kept."""
    here = next(vars(module)[name] for module in (sys.modules[__name__], attention, fp8) if name in vars(module))

    def call(*args: Any, **kwargs: Any) -> Any:
        CALLED.add(name)
        return here(*args, **kwargs)

    return call


def _by_engine(answer: Any, stock: Callable[..., Any]) -> Callable[..., Any]:
    """`stock`, which tells Transformer Engine alone `answer`."""

    def ask(*args: Any, **kwargs: Any) -> Any:
        asker = sys._getframe(1).f_globals.get("__name__", "")
        return answer if asker.startswith("transformer_engine") else stock(*args, **kwargs)

    return ask


def install() -> None:
    """Put `NAMES` in place of the extension's functions, wherever Transformer Engine or Megatron has taken them by name."""
    takers = ("transformer_engine", "megatron.core")
    modules = [module for name, module in sys.modules.items() if module and name.startswith(takers)]
    for name in NAMES + attention.NAMES + fp8.NAMES:
        stock, fake = getattr(extension, name), _told(name)
        for module in modules:
            for attribute in [key for key, value in vars(module).items() if value is stock]:
                setattr(module, attribute, fake)
    cuda = torch.cuda
    cuda.is_available = _by_engine(True, cuda.is_available)
    cuda.is_current_stream_capturing = _by_engine(False, cuda.is_current_stream_capturing)
    cuda.get_device_properties = _by_engine(_HOPPER, cuda.get_device_properties)
    cuda.get_device_capability = _by_engine((9, 0), cuda.get_device_capability)
    torch.Tensor.is_cuda = property(_by_engine(True, torch.Tensor.is_cuda.__get__))
    from megatron.core.distributed import param_and_grad_buffer
    from triton.runtime.autotuner import Autotuner

    Autotuner._bench = lambda self, *args, config, **meta: [1.0] * 3  # the interpreter has nothing to choose by
    # NCCL takes FP8 and bfloat16 in one group of calls; gloo flattens them to one dtype. One after the other, then.
    together = param_and_grad_buffer._coalescing_manager
    param_and_grad_buffer._coalescing_manager = lambda group, async_ops: (
        together(group, async_ops=True) if async_ops else nullcontext()
    )
