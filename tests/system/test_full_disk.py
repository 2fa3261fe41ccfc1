"""A full disk at every place where a run writes: one message with the numbers, and the run goes on once there is room.

The kernel is made to refuse: by a limit on the length of files (no rights needed), and by a small disk of its own.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from demo_runs import ROOT, arguments, checkpoints, files_of_at_most, rows, run, tiny_policy, tree, write_text


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """Settings of a small policy."""
    return {"hf_model": tiny_policy(tmp_path_factory.mktemp("tiny") / "policy"), "init": "random"}


@pytest.fixture(scope="module")
def plain(policy):
    """The same, reading plain text."""
    return {**policy, "task": "continue_pt"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("corpus") / "text.jsonl")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, corpus, plain):
    """Metrics of a run of two steps that had all the room it wanted; clocks left out."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(folder, corpus, **plain, train_iters=2) == 0
    return figures(folder)


@pytest.fixture(scope="module")
def one_step(tmp_path_factory, corpus, plain):
    folder = tmp_path_factory.mktemp("one_step") / "run"
    assert run(folder, corpus, **plain, train_iters=1) == 0
    return folder


@pytest.fixture
def begun(tmp_path, one_step):
    """A run of one step of plain text, with its checkpoint."""
    return shutil.copytree(one_step, tmp_path / "run")


def figures(folder):
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in rows(folder)]


def error_of(capsys):
    said = capsys.readouterr().err
    assert "Traceback" not in said
    errors = [line for line in said.splitlines() if "Error: " in line and not line.startswith("Local process")]
    assert len(errors) == 1 and errors[0].startswith("DiskError: "), said
    return errors[0]


def test_a_checkpoint_that_does_not_fit_leaves_the_older_one_and_is_made_when_there_is_room(
    begun, corpus, plain, whole, capsys
):
    before = tree(begun / "checkpoints")
    with files_of_at_most(200_000):
        assert run(begun, corpus, **plain, train_iters=2) == 2
    said = error_of(capsys)
    assert f"{begun / 'checkpoints' / 'step_000002'}: the checkpoint could not be written" in said
    assert "bytes are free. Older checkpoints are untouched" in said
    assert tree(begun / "checkpoints") == before  # nothing half-written stays
    assert run(begun, corpus, **plain, train_iters=2) == 0
    assert figures(begun) == whole
    assert checkpoints(begun) == ["step_000001", "step_000002"]


@pytest.mark.parametrize("file", ["metrics.jsonl", "config.toml"])
def test_a_record_that_does_not_fit_stops_the_run_with_the_record_as_it_was(begun, corpus, plain, whole, file, capsys):
    path = begun / file
    if file == "metrics.jsonl":  # a long history of step 1
        with path.open("a") as stream:
            stream.write((json.dumps({"step": 1, "loss": 0.5}) + "\n") * 2000)
    limit = path.stat().st_size + 50 if file == "metrics.jsonl" else 500
    before = tree(begun)
    capsys.readouterr()
    with files_of_at_most(limit):
        assert run(begun, corpus, **plain, train_iters=2) == 2
    said = error_of(capsys)
    assert str(path) in said and "File too large" in said and "Free some room" in said
    differ = {name for name, digest in tree(begun).items() if before.get(name) != digest}
    assert differ == ({"config.toml"} if file == "metrics.jsonl" else set())  # which has the new --train-iters
    assert run(begun, corpus, **plain, train_iters=2) == 0
    assert (figures(begun)[0], figures(begun)[-1]) == tuple(whole)


def test_rollouts_that_do_not_fit_are_played_again_when_there_is_room(tmp_path, corpus, policy, capsys):
    folder = tmp_path / "run"
    flags = {**policy, "save_interval": 1, "tensorboard": True, "paragraphs_per_step": 4}
    assert run(folder, corpus, **flags, train_iters=1) == 0
    first = (folder / "rollouts.jsonl").read_bytes()
    assert len(first) > 5000  # so that it is this file that meets the limit, before metrics.jsonl
    capsys.readouterr()
    with files_of_at_most(len(first) + 1000):
        assert run(folder, corpus, **flags, train_iters=2) == 2
    assert (
        f"{folder / 'rollouts.jsonl'}: " in (said := error_of(capsys))
        and "it continues from its last checkpoint" in said
    )
    assert (folder / "rollouts.jsonl").read_bytes() == first
    assert checkpoints(folder) == ["step_000001"]
    assert run(folder, corpus, **flags, train_iters=2) == 0
    assert [row["step"] for row in rows(folder)] == [1, 2]
    assert {row["step"] for row in rows(folder, "rollouts.jsonl")} == {1, 2}


def test_an_export_and_a_page_that_do_not_fit_leave_the_earlier_ones(begun, corpus, plain, capsys):
    wanted = {"export_hf": True, "write_page": True, "train_iters": 1}
    assert run(begun, corpus, **plain, **wanted) == 0
    before = tree(begun)
    capsys.readouterr()
    with files_of_at_most(200_000):
        assert run(begun, corpus, **plain, **wanted) == 2
    assert (
        f"{begun / 'hf'}: the export could not be written: " in (said := error_of(capsys))
        and "nothing was lost" in said
    )
    with files_of_at_most(20_000):
        assert run(begun, corpus, **plain, **{**wanted, "export_hf": False}) == 2
    assert f"{begun / 'report.html'}" in (said := error_of(capsys)) and "File too large" in said
    after = tree(begun)
    config = after.pop("config.toml"), before.pop("config.toml")  # says export_hf = false by now
    assert config[0] != config[1]
    assert after == before


def test_a_dump_that_does_not_fit_does_not_hide_the_refusal(begun, corpus, plain, capsys):
    capsys.readouterr()
    with files_of_at_most(200_000):
        assert run(begun, corpus, **plain, train_iters=12, lr=1e30) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "Error: " in line and "Local" not in line]
    assert len(said) == 1 and said[0].startswith("NumericsError: step "), said
    assert "It could not be dumped: " in said[0] and "-rank0.pt could not be written" in said[0]
    assert "The state before it could not be saved: " in said[0] and "bytes are free" in said[0]
    assert not any(path.suffix == ".tmp" for path in begun.rglob("*"))
    assert checkpoints(begun) == ["step_000001"]


SMALL_DISK = """
set -e
mount -t tmpfs -o size=$1 none "$2"; shift; place=$1; copy=$2; shift 2
set +e
"$@"; code=$?
cp -a "$place/." "$copy"
exit $code
"""


def on_small_disk(size, tmp_path, command):
    """Run `command` with `tmp_path/disk` being a disk of its own; what it left is in `tmp_path/copy`."""
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    disk.mkdir()
    copy.mkdir()
    own = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", SMALL_DISK, "sh"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*own, size, str(disk), str(copy), *command],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )


def may_mount(tmp_path):
    (tmp_path / "try").mkdir()
    return on_small_disk("1m", tmp_path / "try", ["true"]).returncode == 0


def test_a_disk_that_is_full(tmp_path, corpus, policy):
    if not may_mount(tmp_path):
        pytest.skip("this user may not mount a file system in a namespace of its own")
    flags = arguments(tmp_path / "disk" / "run", corpus, **policy, train_iters=1, tensorboard=True)
    ended = on_small_disk("200k", tmp_path, [sys.executable, "-W", "ignore", "-m", "megatron_pz", *flags])
    assert ended.returncode == 2, ended.stderr[-3000:]
    assert "Traceback" not in ended.stderr
    place = re.escape(str(tmp_path / "disk" / "run" / "checkpoints" / "step_000001"))
    full = (
        r"the checkpoint could not be written \(No space left on device: about 1\d{6} bytes are needed\); \d{5,6} bytes"
    )
    assert re.search(f"DiskError: {place}: {full}", ended.stderr), ended.stderr[-3000:]
    left = tmp_path / "copy" / "run"
    for file in ("metrics.jsonl", "rollouts.jsonl", "eval.jsonl"):
        assert all(json.loads(line) for line in (left / file).read_text().splitlines())
    assert not list(left.rglob("*.tmp*")) and not list((left / "checkpoints").iterdir())
