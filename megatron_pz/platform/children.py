"""Processes that multiprocessing makes for a rank, such as those through which Megatron writes a checkpoint, end with the rank.

Otherwise one that is killed leaves them behind: they wait for ever, or write on into a folder that the next start writes too.
The kernel ends them when the rank is gone, however that went (Linux; to be exact, when the thread that made them is gone).
"""

from __future__ import annotations

import ctypes
import functools
import os
import signal

PR_SET_PDEATHSIG = 1
_forking = 0  # process that forks; its child reads it


def follow_parent(main_name: str) -> None:
    """Have this process end with the one that spawned it; does nothing in a program that a user started.

    A program's main module calls it, which multiprocessing imports first in every process that it spawns.

    Args:
        main_name: `__name__` of that module.
    """
    if main_name == "__mp_main__":
        end_with(os.getppid())


@functools.cache
def keep_forks() -> None:
    """Have every process that this one forks from now on end with it; programs that it starts are another matter."""
    os.register_at_fork(before=_note_parent, after_in_child=lambda: end_with(_forking))


def end_with(parent: int) -> None:
    """Have the kernel end this process, a child of `parent`, when `parent` ends.

    Raises:
        OSError: the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it was gone before
        os._exit(1)


def _note_parent() -> None:
    global _forking
    _forking = os.getpid()
