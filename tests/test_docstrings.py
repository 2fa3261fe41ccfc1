"""Docstrings say what a linter cannot know from the types: shapes and dtypes of tensors, units of numbers.

1. A public function that takes or returns tensors or arrays names a shape, `[tokens, vocabulary]`, and a dtype.
2. So does each such field of a public class, in its comment or in the string below it.
3. A number that is a duration, or a size in memory, has its unit in its name.
A method may leave the shape to a parent in the same file, whose method of that name has it.
"""

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "megatron_pz"
TENSOR = re.compile(r"\b(Tensor|ndarray|NDArray)\b")
SHAPE = re.compile(r"\[[^\]]*\]")
DTYPE = re.compile(r"\b(u?int\d+|float\d+\w*|bfloat16|bool|integers|floating|\w*dtypes?)\b", re.IGNORECASE)
NUMBER = re.compile(r"(int|float)( \| None)?")
MEASURED = re.compile(r"(^|_)(time|timeout|duration|pause|wait|grace|delay|deadline|latency|memory|bandwidth)(_|$)")
UNIT = re.compile(r"_(s|ms|ns|seconds|bytes|kib|mib|gib|tb_per_s|tokens|steps|fraction|efficiency)$|^seconds$")


def test_functions_of_tensors_name_shapes_and_dtypes():
    assert found_in_package(functions_without_shape) == []


def test_fields_that_are_tensors_name_shapes_and_dtypes():
    assert found_in_package(fields_without_shape) == []


def test_durations_and_sizes_have_their_unit_in_their_name():
    assert found_in_package(numbers_without_unit) == []


def test_each_rule_finds_what_it_is_for():
    text = '''
def plain(x: Tensor) -> Tensor:
    """The numbers of `x`."""
def shaped(x: Tensor) -> np.ndarray:
    """float32 [n] of `x` [n, H]."""
def _own(x: Tensor): ...
class Parent:
    def forward(self, x: Tensor):
        """[n] of the dtype of `x`."""
class Child(Parent):
    logits: Tensor
    known: Tensor  # float32 [n]
    # int64 [n]
    above: Tensor
    below: list[Tensor]
    """bool [n] each"""
    timeout: float
    wait_s: float
    def forward(self, x: Tensor):
        """As the parent."""
    def backward(self, x: Tensor, *, memory: int = 0): ...
'''
    assert functions_without_shape(text) == ["2 plain", "21 backward"]
    assert fields_without_shape(text) == ["11 logits"]
    assert numbers_without_unit(text) == ["17 timeout", "21 memory"]


def found_in_package(rule):
    return [
        f"{path.relative_to(PACKAGE)}:{one}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for one in rule(path.read_text(encoding="utf-8"))
    ]


def functions_without_shape(text):
    found = []
    for owner, node in public_functions(ast.parse(text)):
        told = "\n".join(ast.get_docstring(one) or "" for one in (node, *inherited(node.name, owner)))
        types = [argument.annotation for argument in arguments(node)] + [node.returns]
        if any(map(is_tensor, types)) and not is_told(told):
            found.append(f"{node.lineno} {node.name}")
    return found


def fields_without_shape(text):
    lines, found = text.splitlines(), []
    for owner in public_classes(ast.parse(text)):
        for node, after in zip(owner.body, [*owner.body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign) and is_tensor(node.annotation) and not node.target.id.startswith("_"):
                first = node.lineno - 1
                while lines[first - 1].lstrip().startswith("#"):
                    first -= 1
                told = "\n".join(line.partition("#")[2] for line in lines[first : node.end_lineno])
                if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                    told += str(after.value.value)
                if not is_told(told):
                    found.append(f"{node.lineno} {node.target.id}")
    return found


def numbers_without_unit(text):
    tree = ast.parse(text)
    named = [(a.arg, a.annotation, a.lineno) for _, node in public_functions(tree) for a in arguments(node)]
    fields = [node for owner in public_classes(tree) for node in owner.body if isinstance(node, ast.AnnAssign)]
    named += [(node.target.id, node.annotation, node.lineno) for node in fields]
    return [
        f"{line} {name}"
        for name, kind, line in sorted(named, key=lambda one: one[2])
        if kind and NUMBER.fullmatch(ast.unparse(kind)) and MEASURED.search(name) and not UNIT.search(name)
    ]


def public_classes(tree):
    return [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]


def public_functions(tree):
    """(class and those that it inherits from in this file, function), methods too."""
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    owners = [(None, tree), *((node, node) for node in public_classes(tree))]
    for owner, holder in owners:
        parents = (
            [classes[base.id] for base in owner.bases if isinstance(base, ast.Name) and base.id in classes]
            if owner
            else []
        )
        for node in holder.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
                yield parents, node


def inherited(name, parents):
    return [
        node for parent in parents for node in parent.body if isinstance(node, ast.FunctionDef) and node.name == name
    ]


def arguments(node):
    every = node.args
    return [*every.posonlyargs, *every.args, *every.kwonlyargs, *filter(None, (every.vararg, every.kwarg))]


def is_tensor(annotation):
    return annotation is not None and TENSOR.search(ast.unparse(annotation)) is not None


def is_told(text):
    return SHAPE.search(text) is not None and DTYPE.search(text) is not None
