"""One place that asks which machine this is."""

from __future__ import annotations

import functools

import torch

from megatron_pz.errors import ConfigError
from megatron_pz.platform import shim
from megatron_pz.platform.base import Platform
from megatron_pz.platform.cpu import CpuPlatform
from megatron_pz.platform.cuda import CudaPlatform
from megatron_pz.platform.versions import check_versions

PLATFORMS: dict[str, type[Platform]] = {"cpu": CpuPlatform, "cuda": CudaPlatform}


@functools.cache
def detect_platform() -> str:
    """What this machine is, or what this process was made into."""
    return "cuda" if torch.cuda.is_available() and not shim.is_installed() else "cpu"


@functools.cache
def _installed(name: str) -> Platform:
    check_versions()
    platform = PLATFORMS[name]()
    platform.install()
    return platform


def select_platform(name: str | None = None) -> Platform:
    """The platform of this process, installed: megatron can be imported after this call.

    Args:
        name: "cpu" or "cuda"; None takes CUDA where there is a device.

    Raises:
        VersionError: the environment is not a supported one.
        ConfigError: the name is unknown, there is no CUDA device, or this process is a CPU one already.
    """
    name = name or detect_platform()
    if name not in PLATFORMS:
        raise ConfigError(f"platform is {name!r}; it must be one of {', '.join(PLATFORMS)}.")
    return _installed(name)
