"""A command as a process tree that ends with this program, with its words in a log file."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from megatron_pz.engine.sglang import supervisor
from megatron_pz.errors import EngineError

GRACE_S = 15.0
"""From SIGTERM to SIGKILL: SGLang looks for a SIGTERM every 5 s, then releases its devices."""

TAIL_BYTES = 64_000


class ProcessTree:
    """`command` under a supervisor (supervisor.py), in a session of its own: Ctrl-C in a terminal does not reach it.

    Args:
        command: program and arguments.
        env: the whole environment of the command.
        log_path: its output is appended here; the folder is made.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str], log_path: Path) -> None:
        self.command, self.env, self.log_path = list(command), dict(env), log_path
        self.pid = 0
        """Of the command itself, once started."""
        self._supervisor: subprocess.Popen[str] | None = None
        self._log_start = 0

    def start(self, check: Callable[[], None] = lambda: None) -> None:
        """Start the command, once one of the same log that a killed program left behind has been ended by its supervisor.

        Args:
            check: called just before; raises where it must not be started.

        Raises:
            EngineError: it cannot be started, or another program keeps such a one.
        """
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log_path, "ab", opener=_for_owner) as log, self._only_one() as lock:
            check()
            self._log_start = log.tell()
            self._supervisor = subprocess.Popen(
                [sys.executable, "-I", "-S", supervisor.__file__, str(os.getpid()), str(GRACE_S), *self.command],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                text=True,
                pass_fds=[lock.fileno()],  # held until the supervisor has ended
            )
        assert self._supervisor.stdout is not None
        with self._supervisor.stdout as output:
            line = output.readline()
        if not line:
            self._supervisor.wait()
            raise EngineError(f"A process could not be started: {self.tail(1)}")
        self.pid = int(line)

    def _only_one(self) -> BinaryIO:
        """A locked file beside the log."""
        path = self.log_path.with_suffix(".lock")
        lock = path.open("wb")
        deadline = time.monotonic() + GRACE_S + supervisor.KILL_TIMEOUT_S + 5
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return lock
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    lock.close()
                    raise EngineError(
                        f"{path} is locked: another program runs the server whose log lies beside it. End that, or give this run "
                        "another --run-dir."
                    ) from error
                time.sleep(0.1)
            except OSError:  # a file system without locks
                return lock

    def is_alive(self) -> bool:
        """Whether the command runs, or anything of it is still being cleaned up."""
        return self._supervisor is not None and self._supervisor.poll() is None

    def stop(self, *, at_once: bool = False) -> None:
        """End the command and everything below it; returns when nothing is left. May be called at any time.

        Args:
            at_once: leave it no time to end by itself.
        """
        if self._supervisor is None or self._supervisor.poll() is not None:
            return
        self._supervisor.send_signal(signal.SIGUSR1 if at_once else signal.SIGTERM)
        try:
            self._supervisor.wait(GRACE_S + supervisor.KILL_TIMEOUT_S + 5)
        except subprocess.TimeoutExpired:  # a stopped supervisor, or a process that no signal ends
            os.killpg(self._supervisor.pid, signal.SIGKILL)
            self._supervisor.wait()

    def ending(self) -> str:
        """How the command ended: "exit code 1", "SIGKILL"; "it runs" while it does."""
        code = self._supervisor.poll() if self._supervisor else None
        if code is None:
            return "it runs"
        number = -code if code < 0 else code - 128
        try:
            return signal.Signals(number).name
        except ValueError:
            return f"exit code {code}"

    def tail(self, lines: int = 20) -> str:
        """Last `lines` lines that the command, as last started, has written."""
        try:
            with self.log_path.open("rb") as log:
                log.seek(0, os.SEEK_END)
                log.seek(max(self._log_start, log.tell() - TAIL_BYTES))
                text = log.read().decode("utf-8", errors="replace")
        except FileNotFoundError:
            return ""
        return "\n".join([line for line in text.splitlines() if line.strip() and not _is_noise(line)][-lines:])


def _for_owner(path: str, flags: int) -> int:
    """Opens a file that only its owner reads: a server writes its key into its log."""
    return os.open(path, flags, 0o600)


def _is_noise(line: str) -> bool:
    """Whether `line` tells nothing: half a warning, or one of the hundred that a library writes after the last error."""
    return line.startswith(("  warnings.warn", "nanobind:", " - leaked", " - ... skipped", "See https://nanobind"))
