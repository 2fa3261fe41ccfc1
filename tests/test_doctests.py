"""The examples in docstrings are true."""

import doctest
import importlib
from pathlib import Path

import pytest

from megatron_pz.platform.select import select_platform

PACKAGE = Path(__file__).parents[1] / "megatron_pz"
MODULES = sorted(
    "megatron_pz." + path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_are_true(name):
    select_platform("cpu")  # some of these modules import Megatron
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0
    assert result.failed == 0
