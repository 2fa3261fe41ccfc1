"""One real SGLang server, in float32 on a CPU, for as long as something is measured."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_pz.engine.sglang.fleet import free_port
from megatron_pz.engine.sglang.server import ServerProcess, ServerSpec

CONTEXT_LENGTH = 512
KEY = "benchmark"


@contextmanager
def real_server(model: Path, python: str, **flags: object) -> Iterator[ServerProcess]:
    """A server that answers, on a free port; its key is `KEY`.

    Args:
        python: interpreter of the servers' environment.
        flags: of SGLang, with `_` for `-`.
    """
    own = {"dtype": "float32", "context-length": CONTEXT_LENGTH}
    with tempfile.TemporaryDirectory() as folder:
        spec = ServerSpec(
            model_path=str(model.resolve()),
            python=os.path.abspath(python),
            host="127.0.0.1",
            port=free_port("127.0.0.1"),
            log_path=Path(folder) / "server.log",
            api_key=KEY,
            flags=own | {name.replace("_", "-"): value for name, value in flags.items()},
        )
        server = ServerProcess(spec)
        server.start()
        try:
            asyncio.run(server.wait_ready(300))
            yield server
        finally:
            server.stop()
