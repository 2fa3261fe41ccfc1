"""One name of another package that is replaced, why, for which versions of megatron-core, and how to see that it still must be."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

ALL = ">=0.16,<0.20"


@dataclass(frozen=True)
class Patch:
    """One replaced name. `target` is `module:attribute`, the attribute may have dots."""

    target: str
    replacement: Callable[[Any], Any]  # given what stands there now (None where nothing does), returns what shall
    reason: str  # who asks for it in megatron-core 0.16.1
    probe: Callable[[], object]  # raises while the target is stock
    versions: str = ALL

    def owner(self) -> tuple[Any, str]:
        """The object that holds the attribute, and the attribute's name."""
        module, _, path = self.target.partition(":")
        *parents, name = path.split(".")
        return functools.reduce(getattr, parents, importlib.import_module(module)), name

    def apply(self) -> None:
        """Replace the target."""
        owner, name = self.owner()
        setattr(owner, name, self.replacement(getattr(owner, name, None)))


def patches_of(patches: Iterable[Patch], megatron_version: str | None = None) -> list[Patch]:
    """Those that this version of megatron-core needs; the installed one's by default."""
    release = Version(Version(megatron_version or version("megatron-core")).base_version)
    return [patch for patch in patches if release in SpecifierSet(patch.versions)]
