"""tools/plan_layout.py accepts every example that names a layout, and says of others what is wrong."""

from pathlib import Path

import programs
import pytest
from example_runs import RANKS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool():
    return programs.tool("plan_layout")


def test_every_example_of_a_layout_has_its_number_of_ranks():
    assert {path.stem for path in (ROOT / "examples").glob("pretrain_zero_*.toml")} == set(RANKS)


@pytest.mark.parametrize("name", RANKS)
def test_an_example_fits(tool, capsys, name):
    status = tool.main([str(ROOT / "examples" / f"{name}.toml"), "--world-size", str(RANKS[name])])
    told = capsys.readouterr().out
    assert (status, told.rstrip().rpartition("\n")[2]) == (0, "fits"), told
    assert "GiB on a GPU" in told and "traffic of a step" in told and "key-value cache" in told and "mfu 0.45" in told


def test_the_demo_fits_a_laptop(tool, capsys):
    example = str(ROOT / "examples" / "demo.toml")
    flags = ["--hf-model", str(ROOT / "examples" / "demo_policy"), "--gpu-memory-gib", "8", "--reserve-gib", "2"]
    assert tool.main([example, "--world-size", "2", "--platform", "cpu", *flags]) == 0
    assert "layers of plain torch" in capsys.readouterr().out


def test_activations_are_told_by_recomputation_and_by_budget(tool, capsys):
    example = str(ROOT / "examples" / "pretrain_zero_qwen3_8b.toml")
    assert tool.main([example, "--world-size", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(index for index, line in enumerate(lines) if line.startswith("GiB of activations and head by tokens"))
    assert lines[at].split()[-3:] == ["8192", "16384", "32768"]
    nothing, core, full = ([float(value) for value in line.split()[-3:]] for line in lines[at + 1 : at + 4])
    assert nothing[0] > core[0] > full[0]
    for half, given, twice in (nothing, core, full):
        assert half < given < twice


def test_a_layout_that_does_not_fit_gets_others_as_flags_that_fit(tool, capsys):
    example = str(ROOT / "examples" / "pretrain_zero_30b_1node.toml")
    assert tool.main([example, "--world-size", "8", "--expert-model-parallel-size", "1"]) == 1
    told = capsys.readouterr().out
    assert "does not fit: stage 0 needs" in told
    flags = told.partition("as flags, the first: ")[2].split()
    assert tool.main([example, "--world-size", "8", *flags]) == 0
    assert capsys.readouterr().out.rstrip().endswith("fits")


def test_a_layout_that_cannot_be_shared_out_is_explained(tool, capsys):
    example = str(ROOT / "examples" / "pretrain_zero_qwen3_4b.toml")
    assert tool.main([example, "--world-size", "8", "--tensor-model-parallel-size", "3"]) == 1
    told = capsys.readouterr().out
    assert "8 ranks cannot be shared out" in told and "layouts that fit, the nearest first" in told


def test_an_unknown_setting_is_an_error(tool, capsys):
    example = str(ROOT / "examples" / "pretrain_zero_qwen3_4b.toml")
    assert tool.main([example, "--world-size", "8", "--tensor-parallel", "2"]) == 2
    assert "tensor-parallel" in capsys.readouterr().err
