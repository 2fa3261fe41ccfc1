"""What a checkpoint says of itself, and every way in which it can be wrong."""

import hashlib
import json

import pytest

from megatron_pz.checkpoint.checksum import BLOCK
from megatron_pz.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    damage,
    fingerprint,
    read_manifest,
    share,
    write_manifest,
)
from megatron_pz.checkpoint.verify import verified
from megatron_pz.errors import CheckpointError

MODEL = "the model's fingerprint"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a.distcp").write_bytes(b"0123456789")
    (tmp_path / "run_state.json").write_text("{}")
    write_manifest(tmp_path, {"step": 3, "model": MODEL})
    return tmp_path


def test_a_whole_folder_passes_with_its_facts(folder):
    manifest = verified(folder, MODEL)
    assert (manifest["format"], manifest["step"]) == (FORMAT, 3)
    # printf 0123456789 | gzip -c | tail -c8 | od -An -tx4 -N4
    assert manifest["files"]["shards/a.distcp"] == {"bytes": 10, "checksum": "crc32:a684c7c6"}
    assert set(manifest["files"]) == {"shards/a.distcp", "run_state.json"}


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda f: (f / "shards" / "a.distcp").write_bytes(b"012345678x"), "a.distcp was altered after it was written"),
        (lambda f: (f / "shards" / "a.distcp").write_bytes(b"01234"), "a.distcp has 5 bytes, was written with 10"),
        (lambda f: (f / "run_state.json").unlink(), "run_state.json is missing"),
        (lambda f: (f / MANIFEST).unlink(), "no readable manifest.json .*No such file.* Move it away"),
        (lambda f: (f / MANIFEST).write_text('{"format"'), "no readable manifest.json"),
        (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe"), "no readable manifest.json"),
        (lambda f: (f / MANIFEST).write_text("[]"), "format is None, wanted 'megatron_pz checkpoint 3'"),
        (lambda f: (f / MANIFEST).write_text('{"format": "other 9"}'), "format is 'other 9', wanted"),
    ],
)
def test_damage_is_named(folder, damage, told):
    damage(folder)
    with pytest.raises(CheckpointError, match=told) as error:
        verified(folder, MODEL)
    assert str(folder) in str(error.value)


def test_another_model_is_refused(folder):
    with pytest.raises(CheckpointError, match="belongs to another model .*--run-dir"):
        verified(folder, "another")


def test_a_file_that_came_later_does_no_harm(folder):
    (folder / "notes.txt").write_text("mine")
    verified(folder, MODEL)


def test_a_fingerprint_is_of_the_shape_alone():
    one = {"hidden_size": 8, "model_type": "qwen3", "dtype": "bfloat16", "transformers_version": "5"}
    assert fingerprint(one) == fingerprint({"model_type": "qwen3", "hidden_size": 8, "torch_dtype": "float32"})
    assert fingerprint(one) != fingerprint({**one, "hidden_size": 16})


def test_a_manifest_is_json_that_others_can_read(folder):
    assert json.loads((folder / MANIFEST).read_text())["model"] == MODEL


def test_every_fault_is_told_and_of_many_the_first(folder):
    for number in range(12):
        (folder / f"{number:02d}.bin").write_bytes(bytes([number]) * 10)
    write_manifest(folder, {"model": MODEL})
    for number in range(11):
        (folder / f"{number:02d}.bin").unlink()
    found = damage(folder, read_manifest(folder)["files"], threads=3)
    assert found == [f"{number:02d}.bin is missing" for number in range(11)]
    with pytest.raises(CheckpointError, match=r"00.bin is missing; .*07.bin is missing and 3 more\.$"):
        verified(folder, MODEL)


def test_a_large_file_is_digested_block_by_block_and_its_bytes_are_counted(tmp_path):
    data = bytes(range(256)) * (2 * BLOCK // 256) + b"and a little more"
    (tmp_path / "large").write_bytes(data)
    write_manifest(tmp_path, {"model": MODEL})
    counted = []
    assert damage(tmp_path, read_manifest(tmp_path)["files"], advance=counted.append) == []
    assert counted == [BLOCK, BLOCK, 17]
    for place in (0, BLOCK - 1, BLOCK, len(data) - 1):
        (tmp_path / "large").write_bytes(data[:place] + b"?" + data[place + 1 :])
        assert damage(tmp_path, read_manifest(tmp_path)["files"]) == ["large was altered after it was written"]


def test_ranks_share_the_files_so_that_each_is_read_once_and_all_read_as_much():
    files = {f"{size}": {"bytes": size} for size in (8, 7, 6, 5, 4)}
    assert [list(share(files, rank, 2)) for rank in (0, 1)] == [["8", "5", "4"], ["7", "6"]]
    shares = [share(files, rank, 9) for rank in range(9)]
    assert sorted(name for mine in shares for name in mine) == sorted(files)


@pytest.mark.parametrize("number", [1, 2])
def test_a_checkpoint_of_an_earlier_format_is_read_and_its_damage_found(folder, number):
    manifest = json.loads((folder / MANIFEST).read_text()) | {"format": f"megatron_pz checkpoint {number}"}
    # printf 0123456789 | sha256sum
    digest = "84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882"
    manifest["files"]["shards/a.distcp"] = {"bytes": 10, "sha256": digest}
    manifest["files"]["run_state.json"] = {"bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert verified(folder, MODEL) == manifest
    (folder / "shards" / "a.distcp").write_bytes(b"012345678x")
    with pytest.raises(CheckpointError, match=r"damaged: shards/a.distcp was altered after it was written\.$"):
        verified(folder, MODEL)


def test_a_checksum_that_is_not_known_is_refused_by_name(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["shards/a.distcp"]["checksum"] = "xxh9:00"
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="'xxh9' is not known here, crc32 and sha256 are: a newer version"):
        verified(folder, MODEL)
