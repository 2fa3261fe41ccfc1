"""Layers with Transformer Engine's parameters; in an FP8 context products demand its shapes, and are computed as they were."""

from contextlib import contextmanager, nullcontext
from itertools import pairwise
from types import SimpleNamespace

import torch
import torch.nn.functional as F

SEEN = []
"""(recipe's class, tokens) of each product in an FP8 context."""
_RECIPES = [None]


@contextmanager
def fp8_autocast(enabled=True, fp8_recipe=None, fp8_group=None):
    _RECIPES.append(fp8_recipe if enabled else None)
    try:
        yield
    finally:
        _RECIPES.pop()


def fp8_model_init(enabled=True, recipe=None, preserve_high_precision_init_val=False):
    return nullcontext()


def _product(x, weight):
    recipe = _RECIPES[-1]
    if recipe is not None:
        tokens = x.shape[:-1].numel()
        assert tokens % 8 == 0 and weight.shape[0] % 16 == weight.shape[1] % 16 == 0, (x.shape, weight.shape)
        SEEN.append((type(recipe).__name__, tokens))
    return F.linear(x, weight)


class _Base(torch.nn.Module):
    def get_extra_state(self):
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        assert state is None or state.numel() == 0


def _parameter(*shape, params_dtype, device, fill=None):
    made = torch.empty(*shape, dtype=params_dtype, device=device)
    return torch.nn.Parameter(made.normal_(0, 0.02) if fill is None else made.fill_(fill))


class _Linear(_Base):
    def __init__(self, in_features, out_features, params_dtype, device, tp_size=1, parallel_mode=None, bias=False, **_):
        super().__init__()
        assert not bias and tp_size == 1
        self.in_features, self.out_features, self.use_bias, self.tp_size = in_features, out_features, bias, tp_size
        self.weight = _parameter(out_features, in_features, params_dtype=params_dtype, device=device)


class Linear(_Linear):
    save_original_input = False

    def forward(self, x, is_first_microbatch=None):
        return _product(x, self.weight)


class LayerNormLinear(_Linear):
    def __init__(self, in_features, out_features, *, eps, normalization, params_dtype, device, **rest):
        super().__init__(in_features, out_features, params_dtype, device, **rest)
        assert normalization == "RMSNorm"
        self.eps, self.layer_norm_weight = (
            eps,
            _parameter(in_features, params_dtype=params_dtype, device=device, fill=1.0),
        )

    def forward(self, x, is_first_microbatch=None):
        return _product(F.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps), self.weight)


class GroupedLinear(_Base):
    def __init__(self, num_gemms, in_features, out_features, *, params_dtype, device, bias, tp_size=1, **_):
        super().__init__()
        assert not bias and tp_size == 1
        self.num_gemms, self.use_bias, self.save_original_input = num_gemms, bias, False
        self.fp8 = self.fp8_calibration = False
        self.fp8_meta = {"fp8_checkpoint": False}
        for index in range(num_gemms):
            weight = _parameter(out_features, in_features, params_dtype=params_dtype, device=device)
            self.register_parameter(f"weight{index}", weight)

    def init_fp8_metadata(self, num_gemms=1):
        pass

    def forward(self, x, m_splits, is_first_microbatch=None):
        parts = x.split([int(size) for size in m_splits])
        return torch.cat([_product(part, getattr(self, f"weight{i}")) for i, part in enumerate(parts)])


class RMSNorm(_Base):
    def __init__(self, normalized_shape=None, eps=1e-5, *, params_dtype, device, sequence_parallel=False, **rest):
        super().__init__()
        size = normalized_shape or rest["hidden_size"]  # its older name, which Megatron-Core says up to 0.16
        self.eps, self.weight = eps, _parameter(size, params_dtype=params_dtype, device=device, fill=1.0)
        self.weight.sequence_parallel = sequence_parallel

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


LayerNorm = RMSNorm


class DotProductAttention(_Base):
    def __init__(self, *_, softmax_scale=None, **__):
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(self, q, k, v, mask, *, attn_mask_type, qkv_format="sbhd", cu_seqlens_q=None, **_):
        if qkv_format == "sbhd":
            q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
            return self._attend(q, k, v).permute(2, 0, 1, 3).flatten(2)
        assert attn_mask_type == "padding_causal" and cu_seqlens_q.dtype is torch.int32
        sizes = [end - start for start, end in pairwise(cu_seqlens_q.tolist())]
        pieces = zip(*(x.split(sizes) for x in (q, k, v)), strict=True)
        return torch.cat(
            [self._attend(*(x.transpose(0, 1) for x in piece)).transpose(0, 1) for piece in pieces]
        ).flatten(1)

    def _attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=True)


class Fp8Padding(torch.nn.Module):
    """Each expert's tokens up to a multiple of 16, with zeros behind them."""

    def __init__(self, num_gemms, align_size=None):
        super().__init__()
        self.align_size = align_size or 16

    def forward(self, x, m_splits):
        sizes = [int(size) for size in m_splits]
        wanted = [-(-size // self.align_size) * self.align_size for size in sizes]
        parts = zip(x.split(sizes), sizes, wanted, strict=True)
        return torch.cat([F.pad(part, (0, 0, 0, to - size)) for part, size, to in parts]), wanted


class Fp8Unpadding(Fp8Padding):
    def forward(self, x, m_splits):
        sizes = [int(size) for size in m_splits]
        wanted = [-(-size // self.align_size) * self.align_size for size in sizes]
        return torch.cat([part[:size] for part, size in zip(x.split(wanted), sizes, strict=True)])


class _Tracker:
    def __init__(self):
        self.states_ = {}


class _Operations:
    def __getattr__(self, name):
        return type(name, (torch.nn.Module,), {})


distributed = SimpleNamespace(CudaRNGStatesTracker=_Tracker)
ops = _Operations()
