"""Which environments are refused, and what a run says in one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_pz.errors import VersionError
from megatron_pz.platform.versions import check_versions, installed

ROOT = Path(__file__).parents[2]
GOOD = {"Python": "3.12.4", "megatron-core": "0.19.2", "torch": "2.13.0+cpu", "transformers": "5.23.0"}


def test_the_environment_of_these_tests_is_supported():
    assert None not in installed().values()
    check_versions()


@pytest.mark.parametrize(
    "name, found", [("megatron-core", "0.16.1rc0"), ("torch", "2.11.0a0+git1234"), ("torch", "2.9.0")]
)
def test_a_build_counts_as_the_release_that_it_is_of(name, found):
    check_versions(GOOD | {name: found})


@pytest.mark.parametrize(
    "name, found, wanted",
    [
        ("Python", "3.10.14", ">=3.11,<3.13"),
        ("Python", "3.13.0", ">=3.11,<3.13"),
        ("megatron-core", "0.15.3", ">=0.16.1,<0.20"),
        ("megatron-core", "0.20.0", ">=0.16.1,<0.20"),
        ("torch", "2.8.0+cu128", ">=2.9,<3"),
        ("transformers", "4.57.1", ">=5.19,<6"),
        ("torch", "unknown", ">=2.9,<3"),
    ],
)
def test_what_is_out_of_range_is_named_with_what_is_wanted(name, found, wanted):
    with pytest.raises(VersionError) as caught:
        check_versions(GOOD | {name: found})
    assert f"{name} is {found}, wanted is {wanted}." in str(caught.value)
    way_out = "Python 3.11 or 3.12" if name == "Python" else f"pip install '{name}{wanted}'`"
    assert way_out in str(caught.value)
    assert not [other for other in GOOD if other != name and f"{other} is " in str(caught.value)]


def test_all_that_is_wrong_is_told_at_once_and_what_is_missing_too():
    with pytest.raises(VersionError) as caught:
        check_versions(GOOD | {"torch": "1.13", "megatron-core": None})
    assert "megatron-core is not installed, wanted is >=0.16.1,<0.20; torch is 1.13, wanted is >=2.9,<3." in str(
        caught.value
    )
    assert "pip install 'megatron-core>=0.16.1,<0.20' 'torch>=2.9,<3'`" in str(caught.value)


def _run(site: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """With the packages of `site` before those installed."""
    return subprocess.run(
        [sys.executable, *args],
        env=os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{ROOT}"} | env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def old_transformers(tmp_path):
    """A folder with the metadata of transformers 4.57.1, and a package that cannot be imported."""
    metadata = tmp_path / "transformers-4.57.1.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.57.1\n")
    (tmp_path / "transformers.py").write_text("raise ImportError('this version lacks what is needed')\n")
    return tmp_path


def test_a_run_says_one_line_and_imports_nothing_else(old_transformers):
    done = _run(old_transformers, "-m", "megatron_pz", "examples/demo.toml")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("VersionError: ")
    assert (
        f"transformers is 4.57.1, wanted is >=5.19,<6. Please run `{sys.executable} -m pip install 'transformers>=5.19,<6'`."
        in line
    )


def test_of_a_nodes_ranks_the_first_says_it(old_transformers):
    told = _run(old_transformers, "-m", "megatron_pz", "examples/demo.toml", RANK="8", LOCAL_RANK="0").stderr
    assert told.startswith("rank 8: VersionError: ")


def test_a_tool_is_refused_where_it_chooses_its_platform(old_transformers):
    code = "from megatron_pz.platform.select import select_platform; select_platform('cpu')"
    done = _run(old_transformers, "-c", code)
    assert done.returncode == 1
    assert "VersionError: This environment" in done.stderr.splitlines()[-1]
