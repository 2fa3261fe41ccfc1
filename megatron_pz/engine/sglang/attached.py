"""SGLang servers that run already, asked without a trainer: to play, to evaluate."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from megatron_pz.config.schema import Config
from megatron_pz.engine.sglang.client import Client
from megatron_pz.engine.sglang.fleet import AttachedFleet
from megatron_pz.engine.sglang.pool import Pool
from megatron_pz.engine.sglang.specs import read_key, server_urls
from megatron_pz.errors import ConfigError
from megatron_pz.types import Generate


@asynccontextmanager
async def attached(
    config: Config,
    hf_config: Mapping[str, Any],
    longest: int,
    tell: Callable[[str], None],
    experts_shape: tuple[int, int] | None = None,
) -> AsyncIterator[tuple[Generate, str]]:
    """(generate, name of the weights) over the servers that `config` names, which must all have the same weights.

    Args:
        longest: most tokens of prompt and response together.
        experts_shape: (layers, experts a token) of the routed experts that are wanted beside the tokens; None: none are.

    Raises:
        ConfigError: the servers have different weights.
        EngineError: a server does not answer.
    """
    key = read_key(config.sglang.api_key_file)
    fleet = AttachedFleet(server_urls(config), key)

    def waiting(waited_s: float, line: str) -> None:
        tell(f"waiting for {waited_s:.0f} s: {line}")

    await fleet.wait_ready(config.sglang.server_start_timeout_s, waiting)

    def client(url: str) -> Client:
        return Client(
            url, key, vocab_size=int(hf_config["vocab_size"]), context_length=longest, experts_shape=experts_shape
        )

    clients = [client(url) for url in fleet.urls]
    router = client(config.sglang.router_url) if config.sglang.router_url else None
    pool = Pool(clients, config.engine.max_running_requests, config.sglang.request_timeout_s, router)

    async def wait_for(server: int) -> None:
        await fleet.restart(server, config.sglang.server_start_timeout_s, waiting)

    pool.on_lost = wait_for
    try:
        about = [await server.get("/model_info") for server in clients]
        weights = sorted({f"{info['model_path']} version {info['weight_version']}" for info in about})
        if len(weights) > 1:
            raise ConfigError(f"--server-urls have different weights: {', '.join(weights)}. Give those of one model.")
        yield pool.generate, weights[0]
    finally:
        await pool.close()
