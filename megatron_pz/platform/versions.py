"""Which Python and which packages a run stands on: the ranges of setup.py, looked at before anything else is imported."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from megatron_pz.errors import VersionError, pip_install

PYTHON = "Python"
SUPPORTED: Mapping[str, str] = {
    PYTHON: ">=3.11,<3.13",
    "megatron-core": ">=0.16.1,<0.20",
    "torch": ">=2.9,<3",
    "transformers": ">=5.19,<6",
}
"""0.16.1 is the newest megatron-core for Python 3.11, with which `make test` runs; `make test-latest` has 0.19.2 on 3.12."""


def installed() -> dict[str, str | None]:
    """What is here of `SUPPORTED`; None: it is not installed."""
    return {name: platform.python_version() if name == PYTHON else _version(name) for name in SUPPORTED}


def check_versions(found: Mapping[str, str | None] | None = None) -> None:
    """Return where every version is in its range.

    Args:
        found: by name, as `installed` tells it, which is the default.

    Raises:
        VersionError: naming each that is not, with what is wanted.
    """
    found = installed() if found is None else found
    wrong = [name for name, wanted in SUPPORTED.items() if not _is_within(found[name], wanted)]
    if not wrong:
        return
    told = "; ".join(f"{name} is {found[name] or 'not installed'}, wanted is {SUPPORTED[name]}" for name in wrong)
    ways = (
        ["make an environment with Python 3.11 or 3.12 (PYTHON=python3.11 make demo does)"] if PYTHON in wrong else []
    )
    if packages := [f"{name}{SUPPORTED[name]}" for name in wrong if name != PYTHON]:
        ways.append(f"run `{pip_install(*packages)}`")
    raise VersionError(f"This environment is not one that megatron_pz supports: {told}. Please {' and '.join(ways)}.")


def _is_within(found: str | None, wanted: str) -> bool:
    """Builds of one's own count as the release that they are of: 2.11.0a0+git is 2.11.0."""
    try:
        return found is not None and Version(Version(found).base_version) in SpecifierSet(wanted)
    except InvalidVersion:
        return False


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
