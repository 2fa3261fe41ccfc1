"""Each family against `transformers` on a tiny random model: equal logits, and weights that come back bit by bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config, Qwen3MoeConfig, SmolLM3Config

from megatron_pz.config.schema import Config, ModelConfig
from megatron_pz.errors import ModelError
from megatron_pz.platform.select import select_platform

PLATFORM = select_platform()

from safetensors.torch import load_file, save_file  # noqa: E402

from megatron_pz.checkpoint.hf_export import export_hf  # noqa: E402
from megatron_pz.checkpoint.hf_import import load_hf_weights  # noqa: E402
from megatron_pz.config.schema import ParallelConfig  # noqa: E402
from megatron_pz.models.policy import PolicyModel, build_policy  # noqa: E402
from megatron_pz.train.parallel import init_parallel, shutdown  # noqa: E402

TOLERANCE = 1e-4  # float32; reached: see the assertion's printed figure, about 1e-6
COMMON = {
    "vocab_size": 131,  # padded to 136
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # large, so that a fault is not small
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
MODELS: dict[str, PretrainedConfig] = {
    "qwen3-tied": Qwen3Config(**COMMON, head_dim=32, tie_word_embeddings=True),
    "qwen3-untied": Qwen3Config(**COMMON, head_dim=32, tie_word_embeddings=False),
    "qwen3_moe": Qwen3MoeConfig(
        **COMMON, head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, tie_word_embeddings=False
    ),
    "smollm3": SmolLM3Config(**COMMON, no_rope_layer_interval=2, tie_word_embeddings=True),
    "llama": LlamaConfig(**COMMON, tie_word_embeddings=True),
}


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    init_parallel(ParallelConfig(), PLATFORM, seed=1)
    yield
    shutdown()


def hf_folder(name: str, folder: Path) -> Path:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(MODELS[name], dtype=torch.float32)
    for parameter in model.parameters():  # norms that are not all ones
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    model.save_pretrained(folder)
    return folder


def policy(folder: Path) -> PolicyModel:
    hf_config = json.loads((folder / "config.json").read_text())
    model = build_policy(hf_config, Config(model=ModelConfig(hf_model=str(folder))), PLATFORM)
    load_hf_weights([model], folder)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    folder = hf_folder(name, tmp_path / "hf")
    ids = torch.randint(2, 131, (1, 40), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
        found = policy(folder)(ids, torch.arange(40)[None])
    assert found.shape == (1, 40, 131)
    difference = float((found - wanted).abs().max())
    assert difference < TOLERANCE * max(1.0, float(wanted.abs().max()) / 10), difference


@pytest.mark.parametrize("name", MODELS)
def test_packed_log_probs_are_those_of_transformers_sequence_by_sequence(name: str, tmp_path: Path) -> None:
    folder = hf_folder(name, tmp_path / "hf")
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(2, 131, (1, 30), generator=torch.Generator().manual_seed(6))
    cuts = torch.tensor([0, 11, 12, 30], dtype=torch.int32)
    positions = torch.cat([torch.arange(11), torch.arange(1), torch.arange(18)])[None]
    labels = ids.roll(-1, 1)
    with torch.no_grad():
        packed = PLATFORM.packed_seq_params(cuts)
        found = policy(folder)(ids, positions, packed_seq_params=packed, labels=labels, temperature=0.7)
        for start, end in ((0, 11), (11, 12), (12, 30)):
            logits = reference(ids[:, start:end]).logits[0].double() / 0.7
            log_probs = logits.log_softmax(-1)
            wanted = log_probs.gather(1, labels[0, start:end, None])[:, 0]
            entropy = -(log_probs.exp() * log_probs).sum(-1)
            assert float((found[0, start:end] - wanted).abs().max()) < TOLERANCE
            assert float((found[1, start:end] - entropy).abs().max()) < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_weights_come_back_bit_by_bit(name: str, tmp_path: Path) -> None:
    folder = hf_folder(name, tmp_path / "hf")
    export_hf([policy(folder)], folder, tmp_path / "out")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_missing_left_over_and_misshaped_tensors_are_named(tmp_path: Path) -> None:
    folder = hf_folder("llama", tmp_path / "hf")
    weights = load_file(folder / "model.safetensors")
    norm = weights.pop("model.norm.weight")
    save_file({**weights, "model.extra": norm}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"missing model\.norm\.weight; left over model\.extra"):
        policy(folder)
    save_file({**weights, "model.norm.weight": norm[:-1].clone()}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.norm\.weight has shape \(63,\)"):
        policy(folder)
