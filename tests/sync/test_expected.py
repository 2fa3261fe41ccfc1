"""An export is held against config.json before anything is sent; digests are those of fused tensors (sync/expected.py, digests.py)."""

import hashlib
import json
from dataclasses import replace

import hf_models
import pytest
import torch

from megatron_pz.config.schema import Config
from megatron_pz.models.registry import family
from megatron_pz.platform.select import select_platform

PLATFORM = select_platform("cpu")  # before Megatron is imported

from megatron_pz.errors import ModelError  # noqa: E402
from megatron_pz.models.policy import build_policy  # noqa: E402
from megatron_pz.sync import expected  # noqa: E402
from megatron_pz.sync.digests import server_digests  # noqa: E402
from megatron_pz.sync.expected import check_export, hf_shapes  # noqa: E402
from megatron_pz.train.parallel import init_parallel, shutdown  # noqa: E402


@pytest.fixture(scope="module")
def parallel():
    yield init_parallel(Config().parallel, PLATFORM, seed=1)
    shutdown()


def settings(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", hf_models.MODELS)
def test_config_json_gives_the_names_and_shapes_that_transformers_saves(name, tmp_path):
    hf_models.make(name, tmp_path / "m")
    hf = settings(tmp_path / "m")
    saved = {name: tuple(tensor.shape) for name, tensor in hf_models.tensors(tmp_path / "m").items()}
    assert hf_shapes(family(hf), hf) == saved


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe mixed"])
def test_a_model_that_fits_passes_and_its_shards_taken_for_whole_tensors_do_not(name, tmp_path, parallel, monkeypatch):
    hf_models.make(name, tmp_path / "m")
    model = build_policy(settings(tmp_path / "m"), Config(), PLATFORM)
    check_export([model])
    whole = expected.shards_of

    def halved(chunks):
        """What a rank of two has, said to be all."""
        for shard in whole(chunks):
            is_cut = shard.hf_names[0].endswith("o_proj.weight")
            yield replace(shard, parameter=shard.parameter.chunk(2, 1)[0]) if is_cut else shard

    monkeypatch.setattr(expected, "shards_of", halved)
    with pytest.raises(ModelError, match=r"model.layers.0.self_attn.o_proj.weight has shape \(\d+, \d+\), not"):
        check_export([model])
    monkeypatch.setattr(expected, "shards_of", lambda chunks: whole(chunks)[1:])
    with pytest.raises(ModelError, match="model.embed_tokens.weight is missing"):
        check_export([model])


def digest(*tensors):
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()[:16]


def test_digests_are_those_of_the_fused_tensors_whatever_the_order():
    q, k, v = (torch.full((2, 3), float(value)) for value in (1, 2, 3))
    gates, ups = torch.arange(8.0).reshape(2, 2, 2), -torch.arange(8.0).reshape(2, 2, 2)
    embedding = torch.ones(65, 2)
    layer = "model.layers.0."
    given = [
        (layer + "self_attn.v_proj.weight", v),  # before its turn
        (layer + "self_attn.q_proj.weight", q),
        (layer + "self_attn.k_proj.weight", k),
        *((f"{layer}mlp.experts.{i}.up_proj.weight", ups[i]) for i in (1, 0)),
        *((f"{layer}mlp.experts.{i}.gate_proj.weight", gates[i]) for i in (1, 0)),
        ("model.embed_tokens.weight", embedding),
    ]
    assert server_digests(given, torch.float32) == {
        layer + "self_attn.qkv_proj.weight": digest(q, k, v),
        layer + "mlp.experts.w13_weight": digest(gates[0], ups[0], gates[1], ups[1]),
        "model.embed_tokens.weight": digest(embedding, torch.zeros(63, 2)),
    }
    assert server_digests([("model.norm.weight", q.bfloat16())], torch.float32) == {"model.norm.weight": digest(q)}
    with pytest.raises(ValueError, match="piece 1 of .*qkv_proj.weight came, and piece 0 did not"):
        server_digests([(layer + "self_attn.k_proj.weight", k)], torch.float32)
