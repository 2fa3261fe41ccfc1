"""From the run's settings to its servers."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_pz.config.fp8 import QUANTIZATION_CONFIG
from megatron_pz.config.schema import Config
from megatron_pz.engine.sglang.fleet import AttachedFleet, Fleet, LaunchedFleet, make_key
from megatron_pz.engine.sglang.server import ServerSpec
from megatron_pz.errors import ConfigError

LOG_FOLDER = "logs"


def make_fleet(
    config: Config, model_path: Path, run_dir: Path, *, context_length: int, first_gpu: int = 0
) -> tuple[Fleet, str]:
    """The run's servers, attached to or started (and not waited for), and their key.

    Args:
        model_path: Hugging Face folder that started servers read their first weights from.
        context_length: most tokens of prompt and response together.
        first_gpu: the first of the visible GPUs that servers may use: those before are the trainer's.

    Raises:
        ConfigError: the key's file cannot be read, or a flag of [server] is the run's own.
        EngineError: a server cannot be started.
    """
    if urls := server_urls(config):
        return AttachedFleet(urls, key := read_key(config.sglang.api_key_file)), key
    key = make_key(run_dir)
    fleet = LaunchedFleet(
        server_specs(config, model_path, run_dir, key, context_length=context_length, first_gpu=first_gpu)
    )
    fleet.start()
    return fleet, key


def server_urls(config: Config) -> list[str]:
    """The servers to attach to; none where the run starts its own."""
    return [url.strip().rstrip("/") for url in config.sglang.server_urls.split(",") if url.strip()]


def read_key(path: str) -> str:
    """The key in the file `path`; empty where none is named.

    Raises:
        ConfigError: it cannot be read.
    """
    if not path:
        return ""
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(
            f"--api-key-file {path}: {error.strerror}. It is a file that holds the servers' key."
        ) from error


def server_specs(
    config: Config, model_path: Path, run_dir: Path, api_key: str, *, context_length: int, first_gpu: int = 0
) -> list[ServerSpec]:
    """What each of the run's own servers is started with; arguments as `make_fleet`'s."""
    sglang = config.sglang
    python = os.path.abspath(sglang.server_python) if os.sep in sglang.server_python else sglang.server_python
    specs = []
    for index in range(sglang.num_servers):
        first = first_gpu + index * sglang.gpus_per_server
        specs.append(
            ServerSpec(
                model_path=str(model_path.resolve()),
                python=python or sys.executable,
                host=sglang.server_host,
                port=sglang.server_port + index if sglang.server_port else 0,
                log_path=run_dir.resolve() / LOG_FOLDER / f"server-{index}.log",
                api_key=api_key,
                gpus=tuple(range(first, first + sglang.gpus_per_server)),
                flags=_flags(config, index, context_length) | config.server,
            )
        )
    return specs


def context_length(config: Config, hf_config: Mapping[str, Any]) -> int:
    """Most tokens of prompt and response together that a run asks for and its model takes."""
    wanted = config.task.max_prompt_tokens + config.engine.max_response_tokens
    return min(wanted, int(hf_config.get("max_position_embeddings") or wanted))


def _flags(config: Config, index: int, context_length: int) -> dict[str, Any]:
    flags: dict[str, Any] = {
        "dtype": config.model.params_dtype,
        "context-length": context_length,
        "random-seed": config.train.seed + index,  # else it is drawn at each start
    }
    if config.model.init == "random":
        flags["load-format"] = "dummy"  # there is nothing to read; the trainer hands over its own
    if config.sglang.rollout_precision == "fp8_blockwise":
        # The folder has no such weights: the server makes room for them, and the first sync brings them.
        flags["json-model-override-args"] = {"quantization_config": QUANTIZATION_CONFIG}
        flags["load-format"] = "dummy"
    if config.train.routing_replay:
        flags["enable-return-routed-experts"] = True
    if config.sglang.pause_mode == "in_place":
        flags["disable-radix-cache"] = True  # requests go on with old caches, which later ones must not find
    if config.sglang.colocate and config.sglang.gpus_per_server:
        flags["enable-memory-saver"] = True
    return flags
