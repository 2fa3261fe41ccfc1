"""The shim's table holds what it says: each target is there, and each probe passes once the shim is installed."""

import pytest
from packaging.version import Version

from megatron_pz.platform import shim
from megatron_pz.platform.select import select_platform


@pytest.mark.parametrize("patch", shim.PATCHES, ids=lambda patch: patch.target)
def test_the_probe_passes_with_the_shim(patch: shim.Patch) -> None:
    select_platform("cpu")
    import megatron.core

    if patch in shim.patches_of(megatron.core.__version__):
        patch.probe()


def test_versions_are_told_apart() -> None:
    assert Version("0.16.1") in __import__("packaging.specifiers", fromlist=["SpecifierSet"]).SpecifierSet(shim.ALL)
    assert shim.patches_of("0.16.1")
