"""A real SGLang server on a tiny model with random weights, shared by every test that only talks to it.

    def test_something(server):            # dense Qwen3
        server.url, server.api_key, server.model_path, server.vocab_size, server.context_length

A test must leave a server as it found it: weights of `model_path` with version "default", nothing running, not paused;
`restored(server)` in a `finally` sees to it. A test that ends a server, or starts one with other flags, starts its own by `launch`.
All of tests/sglang runs in one process of `make test` (tests/conftest.py), so at most one of each is up.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sglang_models

from megatron_pz.engine.sglang.client import Client
from megatron_pz.engine.sglang.fleet import free_port
from megatron_pz.engine.sglang.server import ServerProcess, ServerSpec

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-sglang" / "bin" / "python"
START_TIMEOUT_S = 280.0  # 20 s on an idle machine; a test may take 300 s


@dataclass(frozen=True)
class Served:
    """A server that answers."""

    process: ServerProcess
    model_path: Path
    vocab_size: int = sglang_models.VOCAB_SIZE
    context_length: int = sglang_models.CONTEXT_LENGTH

    @property
    def url(self) -> str:
        return self.process.url

    @property
    def api_key(self) -> str:
        return self.process.spec.api_key

    @property
    def pid(self) -> int:
        return self.process.pid

    def client(self, **about: Any) -> Client:
        """As a run makes one."""
        return Client(self.url, self.api_key, vocab_size=self.vocab_size, context_length=self.context_length, **about)

    def call(self, path: str, body: Any = None, timeout_s: float = 60.0) -> Any:
        """Reply to a POST of `body`, or to a GET; an HTTPError where the server refuses."""
        request = urllib.request.Request(
            f"{self.url}{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {self.api_key}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=timeout_s) as reply:
            text = reply.read().decode()
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return text

    def restore(self) -> None:
        """Weights of `model_path` again, version "default", an empty cache."""
        self.call("/continue_generation", {})
        self.call("/abort_request", {"abort_all": True})
        self.call("/update_weights_from_disk", {"model_path": str(self.model_path), "weight_version": "default"})


Launch = Callable[..., Served]


@pytest.fixture(scope="session")
def server_python() -> Path:
    """Interpreter of the servers' environment."""
    if not PYTHON.exists():
        reason = f"no {PYTHON.relative_to(ROOT)}: tools/setup_env.sh server makes it (make test does)"
        if "PZ_NEEDS_SERVER" in os.environ:  # set by the Makefile: there the real server is always tested
            pytest.fail(reason)
        pytest.skip(reason)
    return PYTHON


@pytest.fixture(scope="session")
def launch(server_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    """launch(model_path, **flags) -> Served, ready. Stop it by `.process.stop()`, or it is stopped at the end of all tests."""
    started: list[ServerProcess] = []

    def start(model_path: Path, *, start_timeout_s: float = START_TIMEOUT_S, **flags: Any) -> Served:
        spec = ServerSpec(
            model_path=str(model_path),
            python=str(server_python),
            host="127.0.0.1",
            port=free_port("127.0.0.1"),
            log_path=tmp_path_factory.mktemp("server") / "server.log",
            api_key="the tests' key",
            flags={"dtype": "float32", "random-seed": 1} | flags,
            env={"HF_HUB_OFFLINE": "1"},
        )
        process = ServerProcess(spec)
        process.start()
        started.append(process)
        asyncio.run(process.wait_ready(start_timeout_s))
        return Served(process, model_path)

    yield start
    for process in started:
        process.stop(at_once=True)
    left = subprocess.run(["pgrep", "-f", "sglang.launch_server"], capture_output=True, text=True).stdout.split()
    assert not {str(process.pid) for process in started} & set(left)


@pytest.fixture(scope="session")
def dense_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hugging Face folder of the model that `server` serves."""
    return sglang_models.make_dense(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="session")
def moe_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hugging Face folder of the model that `moe_server` serves."""
    return sglang_models.make_moe(tmp_path_factory.mktemp("models") / "moe")


@pytest.fixture(scope="session")
def server(launch: Launch, dense_model: Path) -> Served:
    """A dense Qwen3 in float32."""
    return launch(dense_model)


@pytest.fixture(scope="session")
def moe_server(launch: Launch, moe_model: Path) -> Served:
    """A Qwen3-MoE in float32, which tells each token's experts where `return_routed_experts` is asked for."""
    return launch(moe_model, **{"enable-return-routed-experts": True})
