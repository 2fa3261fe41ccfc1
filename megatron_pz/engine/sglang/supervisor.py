"""A small process between the trainer and a server: when the trainer is gone, however it went, so is the server.

    python supervisor.py PARENT_PID GRACE_SECONDS COMMAND ...

Its own program, on the standard library alone: it starts in a blink and holds 10 MB. The command's process id is its one
line on standard output; the command writes to what was standard error. Linux.

- It adopts every orphan below it (a "subreaper"), so that it finds servers' grandchildren in whatever session they are.
- It ends when the command ends, when the process PARENT_PID is no longer its parent, or on SIGTERM: the command then gets a
  SIGTERM and GRACE_SECONDS, what is left a SIGKILL. SIGUSR1 leaves no grace.
- Killed itself by SIGKILL, it takes the command along (PR_SET_PDEATHSIG).

Exit status: the command's; 128 + n where signal n ended it; 127 where it could not be started.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
INTERVAL_S = 0.1
KILL_TIMEOUT_S = 20.0  # a process that waits for a device ends when the device answers

prctl = ctypes.CDLL(None, use_errno=True).prctl


class Orders:
    """What signals have asked for."""

    stop = False
    at_once = False

    def gently(self, *_: object) -> None:
        self.stop = True

    def now(self, *_: object) -> None:
        self.stop = self.at_once = True


def supervise(parent: int, grace_s: float, command: Sequence[str]) -> int:
    """Run `command` until it ends or is to end, leave nothing of it, and return its exit status."""
    orders = Orders()
    signal.signal(signal.SIGTERM, orders.gently)
    signal.signal(signal.SIGUSR1, orders.now)
    for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):  # a handler, unlike SIG_IGN, is not inherited
        signal.signal(ignored, lambda *_: None)
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=2, preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        ).pid
    except OSError as error:
        sys.stderr.write(f"{command[0]}: {error.strerror}\n")
        return 127
    sys.stdout.write(f"{child}\n")
    sys.stdout.flush()

    status: int | None = None
    deadline: float | None = None
    while status is None:
        time.sleep(INTERVAL_S)
        status = reap().get(child)
        if orders.at_once or (deadline is not None and time.monotonic() > deadline):
            break
        if status is None and deadline is None and (orders.stop or os.getppid() != parent):
            deadline = time.monotonic() + grace_s
            os.kill(child, signal.SIGTERM)
    found = kill_all()
    code = os.waitstatus_to_exitcode(found.get(child, 0) if status is None else status)
    return 128 - code if code < 0 else code


def reap() -> dict[int, int]:
    """Wait status of each child, own or adopted, that has ended since the last call, by process id."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended[pid] = status


def kill_all() -> dict[int, int]:
    """SIGKILL everything below this process; wait statuses of the children. Orphans of the killed come here in turn."""
    ended: dict[int, int] = {}
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while (below := descendants()) and time.monotonic() < deadline:
        for pid in below:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.02)
        ended |= reap()
    return ended | reap()


def descendants() -> set[int]:
    """Process ids below this one, those that have ended and were not waited for included."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                    parent = int(file.read().rpartition(")")[2].split()[1])  # a process's name may hold anything
            except OSError:
                continue  # it has ended meanwhile
            children.setdefault(parent, []).append(int(name))
    found: set[int] = set()
    heads = [os.getpid()]
    while heads:
        for pid in children.get(heads.pop(), []):
            found.add(pid)
            heads.append(pid)
    return found


if __name__ == "__main__":
    sys.exit(supervise(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
