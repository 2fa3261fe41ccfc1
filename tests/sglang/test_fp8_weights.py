"""FP8 weights reach SGLang's own FP8 models, by name, shape and value, in the buckets of a push (sglang.rollout_precision).

A server with them needs a GPU. Here SGLang's model classes are built on a CPU and take the buckets as a server does.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import hf_models
import pytest
import sglang_models
import torch
from safetensors.torch import load_file

from megatron_pz.checkpoint.fp8 import all_encoded
from megatron_pz.config.fp8 import BLOCK, QUANTIZATION_CONFIG
from megatron_pz.engine.sglang.served import check_blocks
from megatron_pz.sync.buckets import buckets
from megatron_pz.sync.digests import fused_name
from megatron_pz.sync.tensor import packed

READER = Path(__file__).parent / "fp8_reader.py"
DEMO_POLICY = Path(__file__).parents[2] / "examples" / "demo_policy"
WIDE = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
}  # blocks end where queries, keys and values do


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe", "the demo's policy"])
def test_sglangs_fp8_model_takes_every_tensor_and_scale(kind, server_python, tmp_path, monkeypatch):
    for fields in (sglang_models.QWEN3, sglang_models.QWEN3_MOE):
        for name, value in WIDE.items():
            monkeypatch.setitem(fields, name, value)
    folder, out = tmp_path / "hf", tmp_path / "out.safetensors"
    if kind == "the demo's policy":
        shutil.copytree(DEMO_POLICY, folder)
    else:
        (sglang_models.make_moe if kind == "qwen3_moe" else sglang_models.make_dense)(folder)
    check_blocks(json.loads((folder / "config.json").read_text()), 1)
    plain = hf_models.tensors(folder)
    sent = dict(all_encoded(plain.items()))
    lines = [packed(bucket) for bucket in buckets(all_encoded(plain.items()), 500_000)]
    assert 1 < len(lines) < len(sent) / 4
    (tmp_path / "buckets").write_text("\n".join(lines))
    command = [server_python, READER, folder, json.dumps(QUANTIZATION_CONFIG), tmp_path / "buckets", out]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(word) for word in command], env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(out)
    expected = fused(sent)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype is tensor.dtype, name
        taken = found[name].view(torch.uint8).flatten()
        if "embed_tokens" in name:  # the server's table has rows of no token at its end
            taken = taken[: tensor.nbytes]
        assert torch.equal(taken, tensor.view(torch.uint8).flatten()), name
    name = "model.layers.0.self_attn.qkv_proj.weight"
    wanted = plain["model.layers.0.self_attn.q_proj.weight"].float()
    queries = dequantized(found[name], found[name + "_scale_inv"])[: len(wanted)]
    assert float((queries - wanted).norm() / wanted.norm()) < 2**-4


def dequantized(blocks, scales):
    """float32, the inverse of `checkpoint.fp8.quantized` but for rounding."""
    spread = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return blocks.float() * spread[: blocks.shape[0], : blocks.shape[1]]


def fused(tensors):
    """As SGLang holds them, in one dimension: pieces of a fused tensor one after the other, an expert's gate before its up."""
    pieces: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        whole, place = fused_name(name.removesuffix("_scale_inv"))
        suffix = "_scale_inv" if name.endswith("_scale_inv") else ""
        pieces.setdefault(whole + suffix, {})[place] = tensor
    return {
        name: torch.cat([parts[place].contiguous().view(torch.uint8).flatten() for place in sorted(parts)]).view(
            parts[0].dtype
        )
        for name, parts in pieces.items()
    }
