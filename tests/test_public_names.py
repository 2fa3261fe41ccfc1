"""What a script of a user's own may import: docs/python.md lists it, and this test freezes it."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "python.md"
PUBLIC = {
    "megatron_pz.config.load": {"load_config", "read_config", "to_toml"},
    "megatron_pz.config.rules": {"validate"},
    "megatron_pz.config.schema": {"Config"},
    "megatron_pz.errors": {"MegatronPZError"},
    "megatron_pz.game.advantages": {"advantages"},
    "megatron_pz.game.rewards": {"mask_reward", "prediction_reward"},
    "megatron_pz.report.jsonl": {"read_rows"},
    "megatron_pz.report.page": {"write_page"},
    "megatron_pz.train.launch": {"main", "train"},
    "megatron_pz.types": {"Paragraph", "Mask", "Completion", "Rollout", "Sample", "MicroBatch"},
}
HEAVY = "megatron_pz.train.launch"


def test_the_page_lists_the_public_names_and_no_other():
    rows = re.findall(r"^\| `(megatron_pz[\w.]*)` \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert {module: set(re.findall(r"`(\w+)`", names)) for module, names in rows} == PUBLIC


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_there_and_say_what_they_are(module):
    found = importlib.import_module(module)
    for name in PUBLIC[module]:
        assert getattr(found, name).__module__ == module, f"{name} is only passed through by {module}"
        assert inspect.getdoc(getattr(found, name)), f"{module}.{name} has no docstring"


def test_all_but_the_trainer_loads_without_torch():
    lines = [f"import {module}" for module in PUBLIC if module != HEAVY]
    code = "\n".join([*lines, "import sys", "sys.exit('torch' in sys.modules)"])
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_the_page_s_example_imports_public_names_only():
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    compile(example, str(PAGE), "exec")
    for module, name in re.findall(r"^from (megatron_pz[\w.]*) import (\w+)$", example, re.MULTILINE):
        assert name in PUBLIC[module]


def test_what_tools_benchmarks_and_examples_import_is_there():
    """Most benchmarks run for minutes, so that nobody runs them after a name has changed."""
    root = PAGE.parents[1]
    files = [file for room in ("tools", "benchmarks", "examples") for file in sorted((root / room).rglob("*.py"))]
    missing = [
        f"{file.relative_to(root)}: {module}.{name}"
        for file in files
        for module, name in _imported(file)
        if not _has(root / module.replace(".", "/"), name)
    ]
    assert len(files) > 40 and missing == []


def _imported(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "megatron_pz":
            yield from ((node.module, alias.name) for alias in node.names)


def _has(module, name):
    """Whether `module`, a path without its ending, binds `name`, or is a folder with a module of that name."""
    if (module / f"{name}.py").exists() or (module / name).is_dir():
        return True
    file = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
    bound = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if file.exists() else ():
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            bound |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
    return name in bound
