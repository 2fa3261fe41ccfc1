"""Every name that a file of the package defines is read by the program, its tools or its benchmarks: not by tests alone."""

import ast
from pathlib import Path

from test_public_names import PUBLIC

ROOT = Path(__file__).parents[1]
PROGRAM = ("megatron_pz", "tools", "benchmarks")


def test_no_name_of_the_package_is_read_by_tests_alone():
    trees = {
        path: ast.parse(path.read_text(encoding="utf-8")) for room in PROGRAM for path in (ROOT / room).rglob("*.py")
    }
    read = set().union(*map(read_in, trees.values())) | set().union(*PUBLIC.values())
    package = ROOT / "megatron_pz"
    unread = {
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path, tree in trees.items()
        if package in path.parents
        for name, line in defined_in(tree).items()
        if name not in read
    }
    assert sorted(unread) == []


def test_a_name_that_nobody_reads_is_found():
    tree = ast.parse(
        "import b\nUSED, DEAD = 1, 2\ndef dead(): return USED\nclass Used: ...\n__all__ = [b.Used]\nx: int = 3"
    )
    assert defined_in(tree).keys() - read_in(tree) == {"DEAD", "dead", "x"}


def defined_in(tree):
    """Names at the top of a file with their lines; `__version__` and its like are Python's own business."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found[node.name] = node.lineno
        for at in ast.walk(node) if isinstance(node, ast.Assign | ast.AnnAssign) else ():
            if isinstance(at, ast.Name) and isinstance(at.ctx, ast.Store):
                found[at.id] = at.lineno
    return {name: line for name, line in found.items() if not name.startswith("__")}


def read_in(tree):
    """Names and attributes that a file reads. An import alone reads nothing."""
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return names | {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
