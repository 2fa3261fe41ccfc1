"""What platforms answer, and the layers that the CPU adds to Megatron's."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_pz.platform.select import select_platform

PLATFORM = select_platform("cpu")


from megatron_pz.errors import ConfigError  # noqa: E402
from megatron_pz.models.transformer import RECIPES  # noqa: E402
from megatron_pz.platform import transformer_engine  # noqa: E402
from megatron_pz.platform.base import torch_dtype  # noqa: E402
from megatron_pz.platform.cpu_layers import PackedAttention, RMSNorm  # noqa: E402
from megatron_pz.platform.cuda import CudaPlatform  # noqa: E402


def settings(**fields):
    base = {"context_parallel_size": 1, "params_dtype": torch.float32, "sequence_parallel": False}
    return SimpleNamespace(**(base | fields))


def test_the_cpu_answers_for_itself():
    assert (PLATFORM.name, PLATFORM.backend, PLATFORM.device) == ("cpu", "gloo", torch.device("cpu"))
    assert select_platform("cpu") is PLATFORM
    memory = PLATFORM.memory_bytes()
    assert 50e6 < memory["allocated"] <= 1.05 * memory["peak"]
    PLATFORM.synchronize()


def test_an_unknown_platform_is_told_with_the_known():
    with pytest.raises(ConfigError, match="'tpu'; it must be one of cpu, cuda"):
        select_platform("tpu")


def test_cuda_is_refused_in_a_process_that_runs_as_cpu():
    with pytest.raises(ConfigError, match="already runs as cpu"):
        select_platform("cuda")


def test_transformer_engine_that_is_wanted_and_missing_is_an_error():
    platform = CudaPlatform()
    with pytest.raises(ConfigError, match='transformer_impl = "local"'):
        platform.layer_spec(settings(transformer_impl="transformer_engine"))
    assert platform.transformer_defaults()["transformer_impl"] == "transformer_engine"
    assert platform.transformer_defaults("local")["apply_rope_fusion"] is False


def test_an_engine_that_cannot_pack_float32_is_told_before_a_model_is_built(monkeypatch):
    monkeypatch.setattr(transformer_engine, "version", lambda name: "2.10.0")
    platform = CudaPlatform()
    monkeypatch.setattr(platform, "_engine_fault", None)
    with pytest.raises(
        ConfigError, match=r"float32, but transformer_engine 2\.10\.0 .* from 2\.11 on; use --params-dtype bfloat16"
    ):
        platform.layer_spec(settings(transformer_impl="transformer_engine"))
    assert transformer_engine.dtype_fault(torch.bfloat16) is None
    monkeypatch.setattr(transformer_engine, "version", lambda name: "2.11.0")
    assert transformer_engine.dtype_fault(torch.float32) is None
    assert "context parallelism" in transformer_engine.dtype_fault(torch.float32, 2)
    assert transformer_engine.dtype_fault(torch.bfloat16, 2) is None


@pytest.mark.parametrize(
    ("engine", "capability", "cuda", "recipe", "said"),
    [
        (None, (9, 0), "12.9", "blockwise", None),
        (None, (9, 0), "12.8", "blockwise", "torch was built for CUDA 12.8, and it needs 12.9"),
        (None, (9, 0), "12.8", "delayed", None),
        (None, (8, 6), "12.9", "delayed", "A card has compute capability 8.6, and it needs 8.9"),
        ("Transformer Engine is not installed", (10, 0), "13.0", "mxfp8", "Transformer Engine is not installed"),
    ],
)
def test_what_fp8_lacks_on_a_gpu_is_told(monkeypatch, engine, capability, cuda, recipe, said):
    platform = CudaPlatform()  # real; what torch would say of a GPU is given
    monkeypatch.setattr(platform, "_engine_fault", engine)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A card")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert platform.fp8_fault(recipe, RECIPES[recipe][3]) == said


def test_dtypes_have_names():
    assert torch_dtype("bfloat16") is torch.bfloat16
    with pytest.raises(ConfigError, match="'float8'"):
        torch_dtype("float8")


def test_cumulative_lengths_become_megatrons_packed_sequences():
    found = PLATFORM.packed_seq_params(np.array([0, 3, 10, 11], dtype=np.int32))
    assert found.qkv_format == "thd"
    assert found.cu_seqlens_q.tolist() == [0, 3, 10, 11]
    assert found.cu_seqlens_kv.dtype is torch.int32
    assert (found.max_seqlen_q, found.max_seqlen_kv) == (7, 7)


def test_tensors_made_for_cuda_lie_on_the_cpu_and_keep_everything_else():
    made = torch.full((2,), 3, dtype=torch.int16, device="cuda", pin_memory=True)
    assert (made.device, made.dtype, made.tolist()) == (torch.device("cpu"), torch.int16, [3, 3])
    assert torch.ones(1).to("cuda", torch.float64).dtype is torch.float64
    assert torch.ones(1).cuda().device == torch.device("cpu")
    with torch.device("meta"):
        assert torch.zeros(1).is_meta  # the planner's way of building without memory
    assert torch.ones(1).type() == "torch.FloatTensor"  # only Megatron's optimizers are told otherwise


def test_the_norm_divides_by_the_root_mean_square_and_knows_sequence_parallelism():
    norm = RMSNorm(settings(sequence_parallel=True), 2, eps=0.0)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0]))
    # Root mean square of (3, 4) is sqrt(12.5) = 3.5355.
    assert norm(torch.tensor([3.0, 4.0])).tolist() == pytest.approx([0.848528, 2.262742], abs=1e-5)
    assert norm.weight.sequence_parallel is True
    assert RMSNorm(settings(params_dtype=torch.bfloat16), 2).weight.dtype is torch.bfloat16


def test_packed_attention_is_attention_of_each_sequence_alone():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(7, 4, 8, generator=generator)
    key, value = (torch.randn(7, 2, 8, generator=generator) for _ in range(2))
    attention = PackedAttention(settings(), layer_number=1)
    packed = attention(query, key, value, packed_seq_params=PLATFORM.packed_seq_params(np.array([0, 5, 7])))
    assert packed.shape == (7, 32)
    for start, end in ((0, 5), (5, 7)):
        scores = torch.einsum("qhd,khd->hqk", query[start:end], key[start:end].repeat_interleave(2, 1)) / 8**0.5
        future = torch.ones(end - start, end - start).triu(1).bool()
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        by_hand = torch.einsum("hqk,khd->qhd", weights, value[start:end].repeat_interleave(2, 1)).flatten(1)
        assert torch.allclose(packed[start:end], by_hand, atol=1e-6)
        alone = attention(*(x[start:end, None] for x in (query, key, value)))
        assert torch.allclose(alone[:, 0], by_hand, atol=1e-6)


def test_a_cache_answers_in_place_of_attention():
    attention = PackedAttention(settings(), layer_number=3)
    seen = []

    class Cache:
        def attend(self, layer_index, query, key, value):
            seen.append((layer_index, query.shape, key.shape, value.shape))
            return query.flatten(2)

    query, key = torch.ones(2, 1, 4, 8), torch.ones(2, 1, 2, 8)
    attention.cache = Cache()
    assert attention(query, key, key).shape == (2, 1, 32)
    assert seen == [(2, (2, 1, 4, 8), (2, 1, 2, 8), (2, 1, 2, 8))]
