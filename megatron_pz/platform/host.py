"""Memory of this machine that is free for one more thing."""

from __future__ import annotations

import ctypes
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def available_memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = CGROUP) -> int:
    """Bytes that can be taken without swapping: the machine's, or a container's where that has a limit."""
    lines = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    try:
        limit, used = ((cgroup / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current"))
    except OSError:  # no container, or one of the old kind
        return free
    return free if limit == "max" else min(free, int(limit) - int(used) + _cached(cgroup))


def _cached(cgroup: Path) -> int:
    """Bytes of files that the container's kernel keeps and would give back."""
    try:
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text(encoding="ascii").splitlines())
    except OSError:
        return 0
    return int(stat.get("inactive_file", 0))


def give_back_memory() -> None:
    """Have the C library return what was freed to the machine; does nothing where it is not glibc.

    It keeps blocks of a few MiB for later, and after thousands of tensors of many sizes these add up to gigabytes.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
