"""What is installed is what the sources say (setup.py, constraints/, the scripts that make calls)."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import megatron_pz
from megatron_pz.platform.versions import SUPPORTED

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_pz"


@pytest.fixture(scope="module")
def metadata():
    """The arguments that setup.py gives to setuptools."""
    given = {}
    original = setuptools.setup
    setuptools.setup = lambda **arguments: given.update(arguments)
    try:
        runpy.run_path(str(ROOT / "setup.py"))
    finally:
        setuptools.setup = original
    return given


def constraints(name):
    lines = (ROOT / "constraints" / name).read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in pins}


def requirements(metadata, extras):
    texts = list(metadata["install_requires"])
    for extra in extras:
        texts += metadata["extras_require"][extra]
    return [Requirement(text) for text in texts]


def test_every_folder_with_code_is_a_package(metadata):
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert names == set(metadata["packages"])


def test_every_file_that_is_not_code_is_packaged(metadata):
    packaged = set()
    for package, patterns in metadata["package_data"].items():
        folder = ROOT.joinpath(*package.split("."))
        packaged |= {path for pattern in patterns for path in folder.glob(pattern)}
    data = {p for p in PACKAGE.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert data == packaged


def test_the_version_is_the_packages_and_the_changelogs(metadata):
    assert metadata["version"] == megatron_pz.__version__
    assert f"## [{megatron_pz.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_ranges_that_a_run_checks_are_those_of_the_installation(metadata):
    asked = {requirement.name: requirement.specifier for requirement in requirements(metadata, [])}
    checked = dict(SUPPORTED)
    assert SpecifierSet(checked.pop("Python")) == SpecifierSet(metadata["python_requires"])
    assert {name: SpecifierSet(wanted) for name, wanted in checked.items()} == {name: asked[name] for name in checked}


@pytest.mark.parametrize("name", ["py311.txt", "py312.txt"])
def test_constraints_lie_within_the_ranges(metadata, name):
    pins = constraints(name)
    for requirement in requirements(metadata, ["dev", "smollm2"]):
        pin = pins[canonicalize_name(requirement.name)]
        (exact,) = pin.specifier
        assert exact.operator == "=="
        assert requirement.specifier.contains(exact.version), f"{pin} is outside of {requirement}"


def test_what_is_installed_is_what_the_constraints_say():
    pins = constraints(f"py{sys.version_info.major}{sys.version_info.minor}.txt")
    differ = {}
    for name, pin in pins.items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue  # a pin of another purpose, e.g. of the benchmark
        if not pin.specifier.contains(installed.split("+")[0], prereleases=True):
            differ[name] = f"{installed} is installed, constraints want {pin.specifier}"
    assert differ == {}


def test_megatron_and_its_hidden_need_are_pinned():
    # Saving a distributed checkpoint without psutil hangs for ever.
    pins = constraints("py311.txt")
    assert {"megatron-core", "torch", "psutil", "transformers"} <= pins.keys()


def test_no_file_names_a_registry_or_a_path_of_this_machine():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, timeout=30)
    if listed.returncode:
        pytest.skip("not a git checkout: the list of committed files is not to be had")
    forbidden = re.compile(r"https?://[^/\s]*(?:artifact|mirror|nexus)|" + "/wo" + "rk/(?:main|shared)")
    found = []
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in (".safetensors", ".png", ".model") or not path.is_file():
            continue
        if forbidden.search(path.read_text(encoding="utf-8", errors="ignore")):
            found.append(name)
    assert found == []


def run_setup(folder, path, purpose="run", **environment):
    """tools/setup_env.sh `purpose`, in a bare copy of the project, with `path` as its PATH."""
    folder.mkdir(exist_ok=True)
    shutil.copy(ROOT / "setup.py", folder)
    for name in ("tools", "constraints"):
        shutil.copytree(ROOT / name, folder / name, dirs_exist_ok=True)
    return subprocess.run(
        ["bash", "tools/setup_env.sh", purpose],
        cwd=folder,
        env={"PATH": path, "HOME": str(folder)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def fake(folder, name, text):
    """An executable `name` in `folder` that runs `text`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    (folder / name).chmod(0o755)


@pytest.fixture
def bare_path(tmp_path):
    """A PATH with the system's tools and no Python."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "sh", "cat", "cksum", "df", "awk", "mkdir", "dirname", "grep", "tail", "flock", "id", "env"):
        found = shutil.which(name)
        if found:
            os.symlink(found, tools / name)
    return tools


def test_no_python_is_one_clear_error(tmp_path, bare_path):
    done = run_setup(tmp_path / "clone", str(bare_path))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "no Python 3.11 or 3.12" in done.stderr


def test_a_wrong_python_is_one_clear_error(tmp_path, bare_path):
    fake(bare_path, "python3.9", "echo 3.9")
    done = run_setup(tmp_path / "clone", str(bare_path), PYTHON="python3.9")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [done.stderr.strip()]
    assert "PYTHON=python3.9 is Python 3.9; 3.11 or 3.12 is needed" in done.stderr


def test_the_servers_python_is_looked_for_beside_the_trainers(tmp_path, bare_path):
    fake(bare_path, "python3.12", "echo 3.12")
    done = run_setup(tmp_path / "clone", str(bare_path), "server", PYTHON="python3.12")
    assert done.returncode == 1
    assert "no Python 3.11 with the venv module on the PATH (found: python3.12=3.12 python3.12=3.12)" in done.stderr
    assert len(done.stderr.splitlines()) == 1


PURPOSES = [
    ("run", ".venv", "2500", "torch"),
    pytest.param(
        *("server", ".venv-sglang", "4000", "torch of the server"),
        marks=pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the servers' environment is of Python 3.11"),
    ),
]


@pytest.mark.parametrize(("purpose", "venv", "mib", "what"), PURPOSES)
def test_no_disk_is_one_clear_error(tmp_path, bare_path, purpose, venv, mib, what):
    os.symlink(sys.executable, bare_path / f"python3.{sys.version_info.minor}")
    (bare_path / "df").unlink()
    fake(bare_path, "df", "echo header; echo 'disk 1000000 900000 102400 90% /'")
    done = run_setup(tmp_path / "clone", str(bare_path), purpose)
    assert done.returncode == 1
    assert f"100 MiB are free here; about {mib} are needed" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "clone" / venv).exists()


@pytest.mark.parametrize(("purpose", "venv", "mib", "what"), PURPOSES)
def test_no_registry_is_one_clear_error(tmp_path, bare_path, purpose, venv, mib, what):
    os.symlink(sys.executable, bare_path / f"python3.{sys.version_info.minor}")
    (bare_path / "df").unlink()
    fake(bare_path, "df", "echo header; echo 'disk 1 1 99999999 1% /'")
    nowhere = "http://127.0.0.1:9/simple"  # the discard port: refused at once
    pip = {"PIP_INDEX_URL": nowhere, "PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "0"}
    done = run_setup(tmp_path / "clone", str(bare_path), purpose, **pip)
    assert done.returncode == 1
    assert f"{what}: no package registry could be reached" in done.stderr
    assert len(done.stderr.splitlines()) == 1
