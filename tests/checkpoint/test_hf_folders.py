"""Folders of Hugging Face weights read and written by one process."""

import json
import shutil
from pathlib import Path

import hf_models
import pytest
import torch
from safetensors.torch import save_file

from megatron_pz.platform.select import select_platform

PLATFORM = select_platform("cpu")

from megatron_pz.checkpoint import hf_export  # noqa: E402
from megatron_pz.checkpoint.fp8 import all_encoded  # noqa: E402
from megatron_pz.checkpoint.hf_export import export_hf  # noqa: E402
from megatron_pz.checkpoint.hf_import import load_hf_weights  # noqa: E402
from megatron_pz.config.fp8 import QUANTIZATION_CONFIG  # noqa: E402
from megatron_pz.config.schema import Config, ModelConfig  # noqa: E402
from megatron_pz.errors import DiskError, ModelError  # noqa: E402
from megatron_pz.models.folder import read_hf_config  # noqa: E402
from megatron_pz.models.policy import build_policy  # noqa: E402
from megatron_pz.train.parallel import init_parallel, shutdown  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def alone():
    init_parallel(Config().parallel, PLATFORM, seed=1)
    yield
    shutdown()


def policy(folder: Path, config: Config | None = None):
    return build_policy(read_hf_config(folder), config or Config(), PLATFORM).eval()


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen") / "model"
    hf_models.make("qwen3 untied", folder)
    return folder


@pytest.fixture
def copy(qwen, tmp_path):
    """A folder that may be damaged."""
    return Path(shutil.copytree(qwen, tmp_path / "copy"))


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors of the folder; None takes one out. Dots of names are written as `__`."""
    tensors = hf_models.tensors(folder)
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", hf_models.MODELS)
def test_a_folder_goes_through_megatron_bit_for_bit(name, tmp_path):
    hf_models.make(name, tmp_path / "in")
    model = policy(tmp_path / "in")
    load_hf_weights([model], tmp_path / "in")
    export_hf([model], tmp_path / "in", tmp_path / "out")
    assert same(hf_models.tensors(tmp_path / "in"), hf_models.tensors(tmp_path / "out"))
    assert model.tensor_shape.padded_vocab_size == 136  # 131 up to a multiple of 8


def test_several_files_are_read_and_written_with_an_index(qwen, tmp_path):
    hf_models.make("qwen3 untied", tmp_path / "in", max_shard_size="40KB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 2
    model = policy(tmp_path / "in")
    load_hf_weights([model], tmp_path / "in")
    export_hf([model], tmp_path / "in", tmp_path / "out", max_file_bytes=40_000)
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((tmp_path / "out" / file).stat().st_size < 42_000 for file in files)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    source = hf_models.tensors(qwen)
    assert index["weight_map"].keys() == source.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in source.values())
    assert same(source, hf_models.tensors(tmp_path / "out"))
    # Not to the bit: where a tensor lies in its file decides which kernel multiplies it.
    wanted, found = hf_models.expected_logits(qwen), hf_models.expected_logits(tmp_path / "out")
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_in_as_float32_and_goes_out_as_it_was(dtype, tmp_path):
    hf_models.make("qwen3", tmp_path / "in", dtype)
    model = policy(tmp_path / "in")
    load_hf_weights([model], tmp_path / "in")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    export_hf([model], tmp_path / "in", tmp_path / "out", dtype=dtype)
    assert same(hf_models.tensors(tmp_path / "in"), hf_models.tensors(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_a_folder_in_fp8_says_so_and_holds_the_blocks_of_its_weights(qwen, tmp_path):
    model = policy(qwen)
    load_hf_weights([model], qwen)
    export_hf([model], qwen, tmp_path / "out", in_fp8=True)
    expected = dict(all_encoded(hf_models.tensors(qwen).items()))
    found = hf_models.tensors(tmp_path / "out")
    assert found.keys() == expected.keys() and any(name.endswith("_scale_inv") for name in found)
    assert all(torch.equal(found[name].float(), expected[name].float()) for name in expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"] == QUANTIZATION_CONFIG


def test_float32_weights_are_rounded_to_bfloat16_parameters(qwen):
    model = policy(qwen, Config(model=ModelConfig(params_dtype="bfloat16")))
    load_hf_weights([model], qwen)
    head = hf_models.tensors(qwen)["lm_head.weight"].to(torch.bfloat16)
    assert torch.equal(model.output_layer.weight[: hf_models.VOCAB_SIZE], head)
    assert not model.output_layer.weight[hf_models.VOCAB_SIZE :].any()


def test_missing_and_left_over_tensors_are_named_together(copy):
    rewrite(copy, model__layers__1__self_attn__k_norm__weight=None, model__layers__7__mlp__bias=torch.ones(3))
    with pytest.raises(ModelError) as caught:
        load_hf_weights([policy(copy)], copy)
    assert "missing model.layers.1.self_attn.k_norm.weight" in str(caught.value)
    assert "left over model.layers.7.mlp.bias" in str(caught.value)


def test_every_tensor_of_another_shape_is_named_with_both_shapes(copy):
    rewrite(copy, model__norm__weight=torch.ones(47), model__layers__0__mlp__up_proj__weight=torch.ones(60, 48))
    with pytest.raises(ModelError) as caught:
        load_hf_weights([policy(copy)], copy)
    assert "model.norm.weight has shape (47,), config.json makes it (48,)" in str(caught.value)
    assert "model.layers.0.mlp.up_proj.weight has shape (60, 48), config.json makes it (64, 48)" in str(caught.value)


def test_spare_tensors_are_left_out_without_complaint(tmp_path):
    hf_models.make("qwen3", tmp_path)  # tied
    source = hf_models.tensors(tmp_path)
    rewrite(
        tmp_path,
        lm_head__weight=source["model.embed_tokens.weight"].clone(),
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8),
    )
    load_hf_weights([policy(tmp_path)], tmp_path)


def test_a_folder_without_weights_says_what_to_do(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="neither model.safetensors nor .* --init"):
        load_hf_weights([policy(copy)], copy)


def test_a_truncated_file_is_an_error_that_names_it(copy):
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="model.safetensors cannot be read"):
        load_hf_weights([policy(copy)], copy)


def test_an_index_that_names_an_absent_file_is_an_error(copy):
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="lacks model-00001-of-00002.safetensors"):
        load_hf_weights([policy(copy)], copy)


def test_an_export_takes_settings_along_and_replaces_an_earlier_one(copy, tmp_path):
    (copy / "tokenizer.json").write_text("{}")
    (copy / "notes.bin").write_text("stays here")
    out = tmp_path / "hf"
    out.mkdir()
    (out / "old.txt").write_text("of an earlier export")
    model = policy(copy)
    export_hf([model], copy, out)
    found = {file.name for file in out.iterdir()}
    assert {"config.json", "tokenizer.json", "generation_config.json", "model.safetensors"} == found
    assert sorted(file.name for file in tmp_path.iterdir()) == ["copy", "hf"]  # nothing half-written is left


def test_an_export_that_fails_leaves_the_earlier_one(copy, tmp_path, monkeypatch):
    out = tmp_path / "hf"
    model = policy(copy)
    export_hf([model], copy, out)
    before = hf_models.tensors(out)

    def no_room(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf_export, "save_file", no_room)
    with pytest.raises(DiskError, match="No space left on device"):
        export_hf([model], copy, out)
    assert same(before, hf_models.tensors(out))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["copy", "hf"]
