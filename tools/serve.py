"""Start a run's SGLang servers alone, for instance as a SLURM step beside the trainer's.

    python tools/serve.py CONFIG.toml [--flag value ...]

Takes the run's own TOML file and flags: [sglang], [server], the model, and the run directory for logs and key; with
--api-key-file the key is read from there. Prints what the trainer has to be given when all servers answer, starts a server
that ends again, stops all on SIGTERM or Ctrl-C.
"""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_pz.config.load import load_config
from megatron_pz.config.rules import validate
from megatron_pz.engine.sglang.fleet import KEY_FILE, LaunchedFleet, make_key
from megatron_pz.engine.sglang.serve import public_urls, serve
from megatron_pz.engine.sglang.specs import context_length, read_key, server_specs, server_urls
from megatron_pz.errors import ConfigError, MegatronPZError
from megatron_pz.models.folder import read_hf_config, resolve_folder


def main(argv: Sequence[str]) -> int:
    try:
        config = load_config(argv)
        if urls := server_urls(config):
            raise ConfigError(
                f"--server-urls names servers that run already ({', '.join(urls)}): there is none to start."
            )
        config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, engine="sglang"))
        validate(config, None)
        run_dir = Path(config.checkpoint.run_dir)
        folder = resolve_folder(config.model.hf_model)
        length = context_length(config, read_hf_config(folder))
        key_file = Path(config.sglang.api_key_file or run_dir / KEY_FILE)
        key = read_key(config.sglang.api_key_file) or make_key(run_dir)
        fleet = LaunchedFleet(server_specs(config, folder, run_dir, key, context_length=length))

        def ready() -> None:
            where = f"--server-urls {','.join(public_urls(fleet.urls))} --api-key-file {key_file.resolve()}"
            sys.stdout.write(f"ready: {where}\n")
            sys.stdout.flush()

        asyncio.run(serve(fleet, config.sglang.server_start_timeout_s, _tell, ready))
    except MegatronPZError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 2
    return 0


def _tell(line: str) -> None:
    sys.stderr.write(f"serve: {line}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
