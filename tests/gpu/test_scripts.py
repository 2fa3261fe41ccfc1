"""The command of the GPU benchmarks, on a CPU: its parts and limits, a part's record and table, what is missing told."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
GPU = ROOT / "benchmarks/gpu"


def run(*words, **env):
    return subprocess.run(
        ["bash", str(GPU / "run.sh"), *words],
        env=os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | env,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_the_commands_of_the_readme_hold_every_part_and_its_limits():
    readme = (GPU / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"`PYTHON=python3 benchmarks/gpu/run.sh ([a-z_ ]+)` \| (\d+) s", readme)
    limits: dict[str, int] = {}
    for words, told in commands:
        lines = run("--dry-run", *words.split()).stdout.splitlines()
        limits |= {part: int(line.split()[0]) for part, line in zip(words.split(), lines, strict=True)}
        assert sum(limits[part] for part in words.split()) == int(told) < 600
    every = [int(line.split()[0]) for line in run("--dry-run").stdout.splitlines()]
    assert sorted(every) == sorted(limits.values()) and sum(every) <= 25 * 60


def test_a_part_leaves_its_record_and_a_table(tmp_path):
    done = run("--smoke", "dense", OUT=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "train_step_dense.json").read_text())["finished"]
    (record,) = tmp_path.glob("*-gpu.md")
    assert done.stdout.strip() == record.read_text(encoding="utf-8").strip()
    lines = [line for line in done.stdout.splitlines() if line.startswith("| Qwen3-4B-Base shape, 2 layers")]
    found = {line.split(": ")[1].split(" |")[0]: line for line in lines}
    assert list(found) == ["bf16, local", "packing beside padding", "fp8, local", "transformers, padded"]
    assert re.search(
        r"\d+ tokens/s, peak .* \(forward and backward .*, optimizer .*, held .*\), MFU", found["bf16, local"]
    )
    assert re.search(r"1\.\d\d times fewer tokens, \d+\.\d\d times faster", found["packing beside padding"])
    assert "not run: ConfigError" in found["fp8, local"]


def test_a_part_that_left_nothing_stands_in_the_table_with_its_log(tmp_path):
    done = subprocess.run(
        [sys.executable, str(GPU / "collect.py"), str(tmp_path), "moe"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and f"| moe | not run: see moe.log in {tmp_path}" in done.stdout, done.stderr


def test_an_unknown_part_is_told_with_the_known():
    done = run("speed")
    assert done.returncode == 2 and "no part speed; there are" in done.stderr and "weight_sync" in done.stderr
