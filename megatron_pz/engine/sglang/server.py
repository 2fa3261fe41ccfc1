"""One SGLang server that the run has started: its command line, its process, and the wait until it answers."""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from megatron_pz.engine.sglang.process import ProcessTree
from megatron_pz.engine.sglang.versions import check_version, installed_version
from megatron_pz.errors import ConfigError, EngineError

OWNED = {
    "model-path": "--hf-model",
    "model": "--hf-model",
    "host": "--server-host",
    "port": "--server-port",
    "api-key": "no setting: a key is made for the run",
    "config": "[server] itself, one key a flag",
    "tp-size": "--gpus-per-server",
    "tp": "--gpus-per-server",
    "tensor-parallel-size": "--gpus-per-server",
}
"""Flags that the run sets itself, and by which setting."""

CPU_FLAGS: Mapping[str, Any] = {
    "device": "cpu",
    "attention-backend": "torch_native",
    "max-total-tokens": 32768,  # its own choice is a share of the machine's memory
    "mem-fraction-static": 0.3,
}
"""Of a server without a GPU."""

COMMON_FLAGS: Mapping[str, Any] = {
    "skip-tokenizer-init": True,  # the trainer sends and takes token ids
    "sleep-on-idle": True,  # else each scheduler keeps a core busy while the trainer works
    "log-level-http": "warning",  # no line for each request
}

PROBE_TIMEOUT_S = 10.0
PROBE_INTERVAL_S = 0.25

_OF_TORCHRUN = re.compile(r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_\w+")
"""What `torchrun` tells the trainer's ranks, and a server would take as told to it."""


@dataclass(frozen=True)
class ServerSpec:
    """What a server is started with."""

    model_path: str
    python: str
    """Interpreter of an environment that has SGLang."""
    host: str
    port: int
    log_path: Path
    api_key: str = field(repr=False)
    gpus: tuple[int, ...] = ()
    """Indices among the GPUs that this process sees; its tensor-parallel size is their number. None: the CPU."""
    flags: Mapping[str, Any] = field(default_factory=dict)
    """Flags of `sglang.launch_server` by name, over the defaults: True is a bare flag, False leaves a default out."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Environment variables beside and over this process's."""

    @property
    def url(self) -> str:
        """Where it is spoken to."""
        return f"http://{self.host}:{self.port}"


def command(spec: ServerSpec, config_path: Path) -> list[str]:
    """Program and arguments of the server.

    Args:
        config_path: SGLang's file of further flags, for what does not belong in a list of processes: the key.

    Raises:
        ConfigError: a flag that the run sets itself.
    """
    given = {name.lstrip("-").replace("_", "-"): value for name, value in spec.flags.items()}
    for name in given.keys() & OWNED.keys():
        raise ConfigError(
            f"[server] sets {name} = {given[name]!r}, which the run sets itself. It comes from {OWNED[name]}."
        )
    flags = dict(COMMON_FLAGS) | ({"tp-size": len(spec.gpus)} if spec.gpus else dict(CPU_FLAGS)) | given
    arguments = ["--model-path", spec.model_path, "--host", spec.host, "--port", str(spec.port)]
    for name, value in flags.items():
        arguments += flag(name, value)
    return [spec.python, "-m", "sglang.launch_server", "--config", str(config_path), *arguments]


def flag(name: str, value: Any) -> list[str]:
    """Arguments that set flag `name`.

    >>> flag("mem-fraction-static", 0.5), flag("enable-memory-saver", True), flag("sleep-on-idle", False)
    (['--mem-fraction-static', '0.5'], ['--enable-memory-saver'], [])
    >>> flag("cuda-graph-bs", [1, 2]), flag("json-model-override-args", {"rope_theta": 1})
    (['--cuda-graph-bs', '1', '2'], ['--json-model-override-args', '{"rope_theta": 1}'])
    """
    if isinstance(value, bool):
        return [f"--{name}"] if value else []
    if isinstance(value, (list, tuple)):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}", json.dumps(value) if isinstance(value, Mapping) else str(value)]


def environment(spec: ServerSpec, base: Mapping[str, str]) -> dict[str, str]:
    """The server's environment, where this process's is `base`.

    Raises:
        EngineError: there are fewer GPUs than the server is to have.
    """
    env = {name: value for name, value in base.items() if not _OF_TORCHRUN.fullmatch(name)}
    if spec.gpus:
        visible = base.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible is not None else None
        if names is not None and max(spec.gpus) >= len(names):
            raise EngineError(
                f"A server is to have GPU {max(spec.gpus)} (counted from 0), CUDA_VISIBLE_DEVICES={visible} has {len(names)}. "
                "Lower --num-servers or --gpus-per-server."
            )
        env["CUDA_VISIBLE_DEVICES"] = ",".join(names[gpu] if names else str(gpu) for gpu in spec.gpus)
    else:
        env["SGLANG_USE_CPU_ENGINE"] = "1"  # without it a CPU server asks for packages of another engine
        env.setdefault("OMP_NUM_THREADS", "1")  # small matrices lose by threads
    return env | dict(spec.env)


class PortTaken(EngineError):
    """Another program took the server's port before the server could listen on it."""


class ServerProcess:
    """The server of `spec`, which ends with this process (process.py)."""

    def __init__(self, spec: ServerSpec) -> None:
        self.spec = spec
        config_path = spec.log_path.with_suffix(".yaml")
        self._config_path = config_path
        self._env = environment(spec, os.environ)
        self._tree = ProcessTree(command(spec, config_path), self._env, spec.log_path)

    @property
    def url(self) -> str:
        """Where it is spoken to."""
        return self.spec.url

    @property
    def pid(self) -> int:
        """SGLang's main process."""
        return self._tree.pid

    def start(self, check: Callable[[], None] = lambda: None) -> None:
        """Start it; it is ready later.

        Args:
            check: see `ProcessTree.start`.

        Raises:
            EngineError: its interpreter or SGLang is missing, or SGLang's version is not supported.
        """
        check_version(installed_version(self.spec.python, self._env), self.spec.python)
        write_secret(self._config_path, json.dumps({"api-key": self.spec.api_key}))  # JSON is YAML
        self._tree.start(check)

    async def wait_ready(self, timeout_s: float, progress: Callable[[float, str], None] = lambda *_: None) -> None:
        """Wait until it generates.

        Args:
            progress: called about once a second with the seconds waited and the log's last line.

        Raises:
            PortTaken: it could not listen, and was stopped.
            EngineError: it has ended, or was not ready after `timeout_s` and was stopped; with its last log lines.
        """
        began = told = time.monotonic()
        timeout = aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S)
        headers = {"Authorization": f"Bearer {self.spec.api_key}"}
        async with aiohttp.ClientSession(timeout=timeout, headers=headers) as session:
            while not await self._answers(session):
                waited = time.monotonic() - began
                if "address already in use" in self.tail().lower():  # it does not end by itself then
                    await asyncio.to_thread(self.stop, at_once=True)
                    raise PortTaken(
                        f"Another program listens on {self.spec.host}:{self.spec.port}, so that the SGLang server could not. "
                        "Choose another --server-port, or 0 for any."
                    )
                if not self.is_alive():
                    raise EngineError(f"{self.death()} It had been starting for {waited:.0f} s.")
                if waited > timeout_s:
                    last = self.tail()
                    await asyncio.to_thread(self.stop, at_once=True)
                    raise EngineError(
                        f"The SGLang server at {self.url} was not ready after {waited:.0f} s and was stopped. "
                        f"Give it longer with --server-start-timeout-s. Its last words, in {self.spec.log_path}:\n{last}"
                    )
                if time.monotonic() - told >= 1:
                    told = time.monotonic()
                    progress(waited, self.tail(1))
                await asyncio.sleep(PROBE_INTERVAL_S)

    async def _answers(self, session: aiohttp.ClientSession) -> bool:
        try:
            async with session.get(f"{self.url}/model_info") as reply:  # under the key: it is this server, no other's
                if reply.status != 200:
                    return False
            async with session.get(f"{self.url}/health") as reply:  # generates a token
                return reply.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    def is_alive(self) -> bool:
        """Whether it runs, or anything of it is still being cleaned up. One that hangs is alive."""
        return self._tree.is_alive()

    def death(self) -> str:
        """How it ended, with the log's last lines; for messages."""
        return (
            f"The SGLang server at {self.url} has ended ({self._tree.ending()}). "
            f"Its last words, in {self.spec.log_path}:\n{self.tail()}\n"
        )

    def tail(self, lines: int = 20) -> str:
        """The log's last lines, without the key."""
        return self._tree.tail(lines).replace(self.spec.api_key or "\0", "***")

    def stop(self, *, at_once: bool = False) -> None:
        """End it; returns when no process of it is left. `at_once`: for one that is lost anyway."""
        self._tree.stop(at_once=at_once)


def write_secret(path: Path, text: str) -> None:
    """Write `text` into `path`, for its owner's eyes only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # a file that others can read would stay readable
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
