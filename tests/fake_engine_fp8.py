"""What the real Transformer Engine compiles for FP8 (blockwise, tensorwise, delayed), in plain torch: see fake_engine_kernels.py.

Values are rounded to FP8 as its recipes say, and a product takes that layout of an operand, by row or by column, that Hopper's takes.
MXFP8 is not here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import transformer_engine_torch as extension
from torch import Tensor
from transformer_engine.pytorch.constants import TE_DType, TE_DType_To_Torch
from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer
from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import Float8BlockwiseQTensorStorage
from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

BLOCK = 128
_DTYPES = {value: key for key, value in TE_DType.items()}
SEEN: list[tuple[str, int]] = []
"""(quantiser's class, rows of the result) of each product of FP8 operands."""


def _bytes(x: Tensor, fp8_dtype) -> Tensor:
    """x rounded to FP8, as the bytes that hold it."""
    limit = torch.finfo(TE_DType_To_Torch[fp8_dtype]).max
    return x.clamp(-limit, limit).to(TE_DType_To_Torch[fp8_dtype]).view(torch.uint8)


def _scale(amax: Tensor, fp8_dtype, power_of_two: bool, least: float = 0.0) -> Tensor:
    found = torch.finfo(TE_DType_To_Torch[fp8_dtype]).max / amax.float().clamp_min(least)
    found = torch.where(amax > 0, found, 1.0)
    return torch.exp2(found.log2().floor()) if power_of_two else found


def _blocks(x: Tensor, rows: int, columns: int) -> Tensor:
    """[m, rows, k, columns] of a matrix that is filled up with zeros."""
    x = F.pad(x.float(), (0, -x.shape[1] % columns, 0, -x.shape[0] % rows))
    return x.reshape(x.shape[0] // rows, rows, x.shape[1] // columns, columns)


def _block_bytes(x: Tensor, quantizer, rows: int) -> tuple[Tensor, Tensor]:
    """Bytes of [M, K] in blocks of `rows` x 128, and their inverse scales [M / rows, K / 128]."""
    blocks = _blocks(x, rows, BLOCK)
    scale = _scale(blocks.abs().amax((1, 3)), quantizer.dtype, quantizer.force_pow_2_scales, quantizer.amax_epsilon)
    scaled = (blocks * scale[:, None, :, None]).reshape(blocks.shape[0] * rows, blocks.shape[2] * BLOCK)[
        : x.shape[0], : x.shape[1]
    ]
    return _bytes(scaled, quantizer.dtype), 1 / scale


def quantize(tensor, quantizer, out=None, noop_flag=None):
    out = quantizer.make_empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) if out is None else out
    flat = tensor.detach().reshape(-1, tensor.shape[-1]).float()
    if isinstance(quantizer, Float8BlockQuantizer):
        rows = BLOCK if quantizer.block_scaling_dim == 2 else 1
        for x, data, scale_inv in (
            (flat, out._rowwise_data, out._rowwise_scale_inv),
            (flat.T, out._columnwise_data, out._columnwise_scale_inv),
        ):
            if data is not None:
                found, inverse = _block_bytes(x, quantizer, rows)
                data.copy_(found.reshape(data.shape))
                inverse = inverse if rows == BLOCK else inverse.T
                scale_inv.zero_()[:, : inverse.shape[1]] = inverse
        return out
    amax = flat.abs().amax() if flat.numel() else flat.new_zeros(())
    if isinstance(quantizer, Float8CurrentScalingQuantizer):
        scale = _scale(amax, quantizer.dtype, quantizer.force_pow_2_scales, quantizer.amax_epsilon)
    else:  # delayed: the scale of earlier steps
        quantizer.amax.copy_(torch.maximum(quantizer.amax, amax).reshape(quantizer.amax.shape))
        scale = quantizer.scale
    found = _bytes(flat * scale, quantizer.dtype)
    if out._data is not None:
        out._data.copy_(found.reshape(out._data.shape))
    if out._transpose is not None:
        out._transpose.copy_(found.T.reshape(out._transpose.shape))
        out._transpose_invalid = False
    out._scale_inv.copy_((1 / scale).reshape(out._scale_inv.shape))
    return out


def dequantize(tensor, out_dtype):
    assert isinstance(tensor, Float8TensorStorage)
    return (tensor._data.view(TE_DType_To_Torch[tensor._fp8_dtype]).float() * tensor._scale_inv).to(_DTYPES[out_dtype])


def operand(x, by_column: bool, product: str, rows: int) -> Tensor:
    """A product's operand in float32, [M, K], from its copy by row or by column, which must be there."""
    if isinstance(x, Float8BlockwiseQTensorStorage):
        SEEN.append((type(x._quantizer).__name__, rows))
        assert x._is_gemm_ready_format()
        data, scale_inv = (
            (x._columnwise_data, x._columnwise_scale_inv) if by_column else (x._rowwise_data, x._rowwise_scale_inv)
        )
        assert data is not None, (product, by_column)
        flat = data.reshape(data.shape[0], -1) if by_column else data.reshape(-1, data.shape[-1])
        wide = _blocks(flat.view(TE_DType_To_Torch[x._fp8_dtype]).float(), BLOCK if x._is_2D_scaled else 1, BLOCK)
        inverse = scale_inv if x._is_2D_scaled else scale_inv.T
        wide = wide * inverse[: wide.shape[0], None, : wide.shape[2], None]
        found = wide.reshape(wide.shape[0] * wide.shape[1], wide.shape[2] * BLOCK)[: flat.shape[0], : flat.shape[1]]
        return found.T if by_column else found
    if isinstance(x, Float8TensorStorage):
        SEEN.append((type(x._quantizer).__name__, rows))
        data = x._transpose if by_column else x._data
        assert data is not None and not (by_column and x._transpose_invalid), (product, by_column)
        flat = data.reshape(data.shape[0], -1).T if by_column else data.reshape(-1, data.shape[-1])
        return flat.view(TE_DType_To_Torch[x._fp8_dtype]).float() * x._scale_inv
    return x.reshape(-1, x.shape[-1]).float()


def split_quantize(tensor, split_sections, quantizers):
    parts = tensor.split(split_sections)
    return [quantize(part, quantizer) for part, quantizer in zip(parts, quantizers, strict=True)]


def fp8_transpose(data, fp8_dtype, out=None):
    found = data.reshape(-1, data.shape[-1]).T.reshape(data.shape[-1], *data.shape[:-1]).contiguous()
    return found if out is None else out.copy_(found)


def fused_multi_row_padding(source, out, sizes, padded):
    out.zero_()
    for part, into, size in zip(source.split(sizes), out.split(padded), sizes, strict=True):
        into[:size] = part


def fused_multi_row_unpadding(source, out, padded, sizes):
    for part, into, size in zip(source.split(padded), out.split(sizes), sizes, strict=True):
        into.copy_(part[:size])


def compute_amax(tensor, amax):
    amax.copy_(tensor.abs().amax().reshape(amax.shape))


def multi_tensor_compute_scale_and_scale_inv(chunk, flag, lists, max_fp8, power_of_two, least):
    kinds = {448.0: extension.DType.kFloat8E4M3, 57344.0: extension.DType.kFloat8E5M2}
    for amax, scale, scale_inv in zip(*lists, strict=True):
        scale.copy_(_scale(amax, kinds[max_fp8], power_of_two, least))
        scale_inv.copy_(1 / scale)


def _placed(shard: Tensor, height: int, width: int, start: int) -> Tensor:
    """A rank's piece of a weight in the whole, zeros elsewhere."""
    return F.pad(shard.float().reshape(-1), (start, height * width - start - shard.numel())).reshape(height, width)


def fp8_block_scaling_compute_partial_amax(shard, amax, height, width, start, block):
    found = _blocks(_placed(shard, height, width, start), block, block).abs().amax((1, 3))
    amax.zero_()[:, : found.shape[1]] = found


def fp8_block_scaling_partial_cast(shard, out, scale, height, width, start, block, fp8_dtype):
    blocks = _blocks(_placed(shard, height, width, start), block, block)
    scaled = blocks * scale[:, None, : blocks.shape[2], None]
    whole = scaled.reshape(blocks.shape[0] * block, -1)[:height, :width].reshape(-1)
    out.copy_(_bytes(whole[start : start + shard.numel()], fp8_dtype))


def fused_amax_and_scale_update_after_reduction(reduced, histories, scales, algorithm, fp8_dtype, margin):
    for amax, history, scale in zip(reduced.split([h.shape[1] for h in histories]), histories, scales, strict=True):
        history[0] = amax
        most = history.amax(0) if algorithm == "max" else history[0]
        limit = torch.where(most > 0, torch.finfo(TE_DType_To_Torch[fp8_dtype]).max / most / 2**margin, scale)
        scale.copy_(limit)
        history.copy_(history.roll(-1, 0))
        history[0].zero_()


NAMES = (
    "quantize", "dequantize", "split_quantize", "fp8_transpose", "fused_multi_row_padding", "fused_multi_row_unpadding", "compute_amax",
    "multi_tensor_compute_scale_and_scale_inv", "fp8_block_scaling_compute_partial_amax", "fp8_block_scaling_partial_cast",
    "fused_amax_and_scale_update_after_reduction",
)  # fmt: skip
