"""Who may import whom, and who may ask for CUDA (design: rooms and layers; contracts in pyproject.toml)."""

import os
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_pz"
MAY_ASK_FOR_CUDA = ("platform", "models/kernels")


LINT = [sys.executable, "-c", "import sys; from importlinter import cli; sys.exit(cli.lint_imports(no_cache=True))"]


def test_the_import_contracts_are_kept():
    run = subprocess.run(LINT, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_a_forbidden_import_breaks_a_contract(tmp_path, capsys, monkeypatch):
    # The rules above would also pass if they looked at nothing: here is a package that breaks each kind.
    package = tmp_path / "megatron_pz"
    for room in (
        "doctor",
        "plan",
        "train",
        "evaluate",
        "checkpoint",
        "sync",
        "tasks",
        "grade",
        "corpus",
        "game",
        "batch",
        "models",
        "engine",
    ):
        (package / room).mkdir(parents=True)
        (package / room / "__init__.py").write_text("")
    (package / "engine" / "sglang").mkdir()
    (package / "engine" / "sglang" / "__init__.py").write_text("import transformers\n")
    for room in ("platform", "report", "config"):
        (package / room).mkdir()
        (package / room / "__init__.py").write_text("")
    for module in ("__init__", "types", "words", "errors", "batch/packing"):
        (package / f"{module}.py").write_text("")
    (package / "game" / "rewards.py").write_text("import torch\nfrom megatron_pz.train import __name__\n")
    (package / "evaluate" / "masks.py").write_text("import megatron.core\nimport sglang\n")
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text(encoding="utf-8"), encoding="utf-8")
    run = subprocess.run(
        LINT,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode != 0
    assert len(re.findall(r" BROKEN$", run.stdout, flags=re.MULTILINE)) == 5, run.stdout + run.stderr


def test_no_files_import_each_other_in_a_circle():
    graph = grimp.build_graph("megatron_pz", cache_dir=None)  # imports inside functions and for types count too
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert imports["megatron_pz.train.loop"] and imports["megatron_pz.doctor.patient"]
    TopologicalSorter(imports).prepare()  # CycleError names the circle


def test_only_the_platform_and_kernels_ask_for_cuda():
    asks = [
        f"{path.relative_to(PACKAGE)}:{number}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if not path.relative_to(PACKAGE).as_posix().startswith(MAY_ASK_FOR_CUDA)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if "torch.cuda" in line
    ]
    assert asks == []


def test_no_module_is_longer_than_350_lines():
    long = {path.name: length for path in PACKAGE.rglob("*.py") if (length := _lines(path)) > 350}
    assert long == {}


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, megatron_pz, megatron_pz.types; print({'torch', 'megatron', 'transformers'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert shown.stdout.strip() == "set()", shown.stderr


def _lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())
