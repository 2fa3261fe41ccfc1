"""Comparing answers under a time limit that holds: in processes of their own, which are ended when it is over.

(An alarm inside the process would not do: one power of two large integers runs for hours inside a single instruction.)
"""

from __future__ import annotations

import json
import os
import queue
import select
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_pz.errors import ConfigError
from megatron_pz.grade import qwen

Rule = Literal["qwen", "math_verify"]
TIME_LIMIT_S = 5.0
START_TIME_S = 120.0
"""The first question of a process also waits for sympy to load."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether an answer is right; where that could not be found out it counts as wrong, and `fault` says why."""

    right: bool
    fault: str | None = None


class Judge:
    """Compares answers; may be called from several threads.

    Args:
        time_limit_s: for one comparison.
        num_workers: comparisons at one time, each in a process that is started when it is first needed.
    """

    def __init__(self, time_limit_s: float = TIME_LIMIT_S, num_workers: int = 1) -> None:
        self.time_limit_s = time_limit_s
        self._free: queue.LifoQueue[_Worker] = queue.LifoQueue()  # one that is warm is taken first
        self._workers = [_Worker() for _ in range(num_workers)]
        for worker in self._workers:
            self._free.put(worker)

    def __call__(self, rule: Rule, answer: str, target: str) -> Verdict:
        """Whether `answer` is `target` by `rule`; a comparison that takes too long, or ends its process, has a fault.

        Raises:
            ConfigError: what the rule needs is not installed.
        """
        if rule == "qwen" and qwen.same_text(answer, target):
            return Verdict(True)
        worker = self._free.get()
        try:
            return worker.ask({"rule": rule, "answer": answer, "target": target}, self.time_limit_s)
        finally:
            self._free.put(worker)

    def close(self) -> None:
        """End the processes. A later call starts them again."""
        for worker in self._workers:
            worker.end()

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Worker:
    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._is_warm = False

    def ask(self, question: dict[str, str], time_limit_s: float) -> Verdict:
        try:
            if not self._is_warm:  # loading sympy is not the answer's time
                self._exchange({"rule": "qwen", "answer": "\\sqrt{4}+x", "target": "x+2"}, START_TIME_S)
                self._exchange({"rule": "math_verify", "answer": "$1$", "target": "1"}, START_TIME_S)
                self._is_warm = True
            said = self._exchange(question, time_limit_s)
        except TimeoutError:
            self.end()
            return Verdict(False, "timeout")
        except (BrokenPipeError, EOFError):
            self.end()
            return Verdict(False, "crash")
        if (fault := said.get("fault")) is None:
            return Verdict(bool(said["right"]))
        if str(fault).startswith("ConfigError: "):
            raise ConfigError(str(fault).removeprefix("ConfigError: "))
        if str(fault).startswith("MemoryError"):
            self.end()  # what it still holds is not known
        return Verdict(False, str(fault))

    def end(self) -> None:
        process, self._process, self._is_warm = self._process, None, False
        if process is not None:
            process.kill()
            process.wait()
            assert process.stdin is not None and process.stdout is not None
            process.stdout.close()
            try:
                process.stdin.close()
            except BrokenPipeError:
                pass  # what it did not read any more

    def _exchange(self, question: dict[str, str], time_limit_s: float) -> dict[str, object]:
        if self._process is None:
            root = str(Path(__file__).parents[2])
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megatron_pz.grade.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))},
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(question).encode() + b"\n")
        self._process.stdin.flush()
        end, said = time.monotonic() + time_limit_s, b""
        descriptor = self._process.stdout.fileno()
        while not said.endswith(b"\n"):
            if not select.select([descriptor], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError
            if not (chunk := os.read(descriptor, 65536)):
                raise EOFError
            said += chunk
        return dict(json.loads(said))
