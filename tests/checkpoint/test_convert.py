"""The conversion tool: whole or not at all, resumable, and what is wrong is named (checkpoint/convert.py)."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import hf_models
import programs
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_pz.platform.select import select_platform

select_platform("cpu")  # before Megatron is imported

from megatron_pz.checkpoint import convert  # noqa: E402
from megatron_pz.checkpoint.compared import differences  # noqa: E402
from megatron_pz.checkpoint.manifest import fingerprint  # noqa: E402
from megatron_pz.checkpoint.verify import verified  # noqa: E402
from megatron_pz.errors import CheckpointError, DiskError, ModelError  # noqa: E402

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"
SPLIT = 40_000  # several files


@pytest.fixture(scope="module")
def tool():
    return programs.tool("convert_checkpoint").main


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folder of a model by its name, in bfloat16."""
    place = tmp_path_factory.mktemp("models")

    def folder(name):
        if not (place / name).exists():
            hf_models.make(name, place / name, torch.bfloat16)
        return place / name

    return folder


def same(first, second):
    a, b = hf_models.tensors(first), hf_models.tensors(second)
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", hf_models.MODELS)
def test_there_and_back_is_the_same_bit_for_bit(tool, models, tmp_path, capsys, name):
    source = models(name)
    assert tool([str(source), str(tmp_path / "there"), "--to", "megatron", "--verify"]) == 0
    assert tool([str(tmp_path / "there"), str(tmp_path / "back"), "--to", "hf", "--verify"]) == 0
    assert capsys.readouterr().out.count("verified") == 2
    assert same(source, tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"
    verified(tmp_path / "there", fingerprint(json.loads((source / "config.json").read_text())))
    import transformers

    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "there"]


def test_a_dtype_that_is_asked_for_is_written_and_verified(tool, models, tmp_path):
    source = models("qwen3")
    assert tool([str(source), str(tmp_path / "there"), "--to", "megatron", "--dtype", "float32", "--verify"]) == 0
    assert tool([str(tmp_path / "there"), str(tmp_path / "same"), "--to", "hf"]) == 0
    assert {tensor.dtype for tensor in hf_models.tensors(tmp_path / "same").values()} == {torch.float32}
    back = [str(tmp_path / "there"), str(tmp_path / "back"), "--to", "hf", "--dtype", "bfloat16", "--verify"]
    assert tool(back) == 0
    assert same(source, tmp_path / "back")


def test_several_files_have_an_index_and_hold_no_more_than_they_may(models, tmp_path):
    source = models("qwen3_moe")
    convert.to_megatron(source, tmp_path / "there", max_file_bytes=SPLIT)
    convert.to_hf(tmp_path / "there", tmp_path / "back", source, max_file_bytes=SPLIT)
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 3 and same(source, tmp_path / "back")
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in hf_models.tensors(source).values())
    assert all(sum(t.nbytes for t in load_file(file).values()) <= SPLIT for file in files)


@pytest.mark.parametrize("to", ["megatron", "hf"])
def test_what_was_whole_when_it_was_killed_is_kept_and_the_rest_is_done(models, tmp_path, monkeypatch, to):
    source, there = models("qwen3_moe"), tmp_path / "whole"
    convert.to_megatron(source, there, max_file_bytes=SPLIT)

    def go(destination, advance=lambda _: None):
        if to == "megatron":
            convert.to_megatron(source, destination, max_file_bytes=SPLIT, advance=advance)
        else:
            convert.to_hf(there, destination, source, max_file_bytes=SPLIT, advance=advance)

    class Killed(BaseException):
        pass

    done = 0

    def die_late(count):
        nonlocal done
        done += count
        if done > 3 * SPLIT:
            raise Killed

    with pytest.raises(Killed):
        go(tmp_path / "out", die_late)
    assert not (tmp_path / "out").exists()
    partial = tmp_path / ".tmp-out"
    lines = (partial / "progress.jsonl").read_text().splitlines()
    kept = [json.loads(line)["name"] for line in lines[1:]]
    assert len(kept) >= 2
    times = {name: (partial / name).stat().st_mtime_ns for name in kept}
    (partial / kept[-1]).write_bytes(b"damaged since")
    go(tmp_path / "out")
    if to == "hf":
        assert same(source, tmp_path / "out")
    else:
        convert.to_hf(tmp_path / "out", tmp_path / "again", source)
        assert same(source, tmp_path / "again")
    for name in kept[:-1]:
        assert (tmp_path / "out" / name).stat().st_mtime_ns == times[name], f"{name} was written again"
    assert (tmp_path / "out" / kept[-1]).stat().st_mtime_ns != times[kept[-1]]


def test_a_real_kill_leaves_nothing_that_looks_complete(models, tmp_path):
    source, out = models("qwen3_moe"), tmp_path / "out"
    code = (
        "import sys, time; from pathlib import Path; from megatron_pz.platform.select import select_platform; "
        "select_platform('cpu'); from megatron_pz.checkpoint import convert; "
        f"convert.to_megatron(Path(sys.argv[1]), Path(sys.argv[2]), max_file_bytes={SPLIT}, "
        "advance=lambda _: (print('.', flush=True), time.sleep(0.02)))"
    )
    command = [sys.executable, "-c", code, str(source), str(out)]
    environment = os.environ | {"PYTHONPATH": str(TOOL.parents[1])}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    process.stdout.readline()
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists() and (tmp_path / ".tmp-out").exists()
    convert.to_megatron(source, out, max_file_bytes=SPLIT)
    convert.to_hf(out, tmp_path / "back", source)
    assert same(source, tmp_path / "back")


def broken_copy(source, tmp_path, change):
    folder = Path(shutil.copytree(source, tmp_path / "broken"))
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


NORM, QUERY = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(NORM), f"missing {NORM}"),
        (lambda t: t.update({"model.layers.9.x": torch.zeros(1)}), "left over model.layers.9.x"),
        (lambda t: t.update({NORM + "s": t.pop(NORM)}), f"missing {NORM}; left over {NORM}s"),
        (
            lambda t: t.update({QUERY: t[QUERY][:-1].clone()}),
            rf"{QUERY} has shape \(63, 48\), config.json makes it \(64, 48\)",
        ),
    ],
    ids=["missing", "extra", "misnamed", "truncated"],
)
def test_tensors_that_do_not_fit_are_named_and_nothing_is_written(models, tmp_path, change, said):
    with pytest.raises(ModelError, match=said):
        convert.to_megatron(broken_copy(models("qwen3"), tmp_path, change), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


def test_a_file_that_is_cut_off_is_named(models, tmp_path):
    folder = Path(shutil.copytree(models("qwen3"), tmp_path / "cut"))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cut/model.safetensors cannot be read"):
        convert.to_megatron(folder, tmp_path / "out")


def test_a_checkpoint_that_is_damaged_or_of_another_model_is_refused(tool, models, tmp_path, capsys):
    source = models("qwen3")
    convert.to_megatron(source, tmp_path / "there")
    with pytest.raises(CheckpointError, match=r"missing .*experts.* and|missing .*router"):
        convert.to_hf(tmp_path / "there", tmp_path / "out", models("qwen3_moe"))
    config = tmp_path / "there" / "hf" / "config.json"
    text = config.read_text()
    config.write_text(json.dumps(json.loads(text) | {"intermediate_size": 96}))
    with pytest.raises(
        CheckpointError, match=r"linear_fc1.weight has shape \(2, 128, 48\), config.json makes it \(2, 192, 48\)"
    ):
        convert.to_hf(tmp_path / "there", tmp_path / "out", tmp_path / "there" / "hf")
    config.write_text(text)
    [shard] = (tmp_path / "there" / "shards").glob("*.distcp")
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=f"{shard.name} is damaged where decoder"):
        convert.to_hf(tmp_path / "there", tmp_path / "out", source)
    assert not (tmp_path / "out").exists()
    assert tool([str(tmp_path), str(tmp_path / "x"), "--to", "hf"]) == 2
    assert "is no checkpoint: it has no folder shards/" in capsys.readouterr().err


def test_an_output_that_exists_is_not_touched(models, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(DiskError, match="there exists already"):
        convert.to_megatron(models("qwen3"), tmp_path / "there")


def test_a_difference_is_found_by_verify(tool, models, tmp_path, monkeypatch, capsys):
    source = models("qwen3")
    convert.to_megatron(source, tmp_path / "there")
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    tensors[QUERY][3, 5] += 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert differences(copy, tmp_path / "there", is_source_hf=False) == [QUERY]
    assert differences(source, tmp_path / "there", is_source_hf=False) == []


def test_bits_are_compared_and_not_numbers(models, tmp_path):
    down = "model.layers.0.mlp.down_proj.weight"

    def change(tensors):
        tensors[NORM][:3] = torch.tensor([torch.nan, 0.0, 1.0])
        tensors[down][0, 0] = torch.nan

    source = broken_copy(models("qwen3"), tmp_path, change)
    convert.to_megatron(source, tmp_path / "there")
    assert differences(source, tmp_path / "there", is_source_hf=True) == []
    tensors = load_file(source / "model.safetensors")
    tensors[NORM][1] = -0.0
    tensors[down][1, 1] += 1
    tensors[QUERY][0, 0] += 1
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert sorted(differences(source, tmp_path / "there", is_source_hf=True)) == sorted([NORM, down, QUERY])


def test_fp8_blocks_are_as_near_as_their_format_allows_and_transformers_reads_them(tmp_path):
    source, there, out = (tmp_path / name for name in ("model", "there", "fp8"))
    name = "model.layers.0.mlp.down_proj.weight"
    import transformers

    torch.manual_seed(1)
    sizes = {"hidden_size": 160, "intermediate_size": 200, "head_dim": 32}  # blocks of 128 do not divide them
    config = transformers.Qwen3Config(**(hf_models.SMALL | {"rope_parameters": hf_models.ROPE} | sizes))
    transformers.Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(source)
    convert.to_megatron(source, there)
    convert.to_hf(there, out, source, dtype=convert.FP8)
    before, after = hf_models.tensors(source), hf_models.tensors(out)
    quantised = {key for key in after if key.endswith("_scale_inv")}
    assert len(quantised) == 2 * 7
    assert after.keys() - quantised == before.keys()
    assert after[name].dtype is torch.float8_e4m3fn and after[name + "_scale_inv"].shape == (2, 2)
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    # By hand: the block's largest weight is at 448, and a weight is off by 1/16 of itself or half the smallest step.
    for row, column in ((0, 0), (1, 0), (0, 1), (1, 1)):
        block = (slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128))
        weights, scale = before[name][block].float(), float(after[name + "_scale_inv"][row, column])
        assert scale == pytest.approx(float(weights.abs().max()) / 448, rel=1e-6)
        found = after[name][block].float() * scale
        assert ((found - weights).abs() <= (weights.abs() / 16).clamp_min(scale * 2**-10) * 1.0001).all()
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "fp8" and settings["weight_block_size"] == [128, 128]
    known = transformers.utils.quantization_config.FineGrainedFP8Config(**settings)
    assert known.weight_block_size == [128, 128]
