"""The engine that the settings ask for, ready to be given weights."""

from __future__ import annotations

import asyncio
import functools
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_pz.checkpoint.fp8 import all_encoded
from megatron_pz.checkpoint.hf_export import export_hf
from megatron_pz.config.rules import GAMES
from megatron_pz.config.schema import Config
from megatron_pz.engine.base import Engine
from megatron_pz.engine.embedded.ranks import ProcessRanks
from megatron_pz.engine.idle import IdleEngine
from megatron_pz.engine.sglang.client import Client
from megatron_pz.engine.sglang.control import Control
from megatron_pz.engine.sglang.engine import SGLangEngine
from megatron_pz.engine.sglang.fleet import Fleet
from megatron_pz.engine.sglang.io_thread import IoThread
from megatron_pz.engine.sglang.pool import Pool
from megatron_pz.engine.sglang.served import check_blocks, check_precision, check_served
from megatron_pz.engine.sglang.specs import context_length, make_fleet, server_urls
from megatron_pz.errors import EngineError
from megatron_pz.platform.base import torch_dtype
from megatron_pz.sync.collective import CollectiveTransport, make_stages
from megatron_pz.sync.disk import FILE_COPIES, DiskTransport
from megatron_pz.sync.expected import check_export
from megatron_pz.sync.export import iterate_hf_tensors
from megatron_pz.sync.handles import HandleTransport
from megatron_pz.sync.push import Transport, WeightPush
from megatron_pz.sync.tensor import TensorTransport
from megatron_pz.sync.verify import Verifier
from megatron_pz.train.decode import embedded_engine
from megatron_pz.train.parallel import Parallel

Tell = Callable[[str], None]
MIB = 1024**2


def make_engine(
    config: Config,
    chunks: Sequence[torch.nn.Module],
    parallel: Parallel,
    folder: Path,
    hf_config: Mapping[str, Any],
    tell: Tell,
) -> Engine:
    """The engine of `config`; its first `load` comes next. All ranks.

    Args:
        folder: Hugging Face folder of the policy.
        tell: shows a line to the user.

    Raises:
        EngineError: servers cannot be started or reached or serve another model, or the layout cannot sample.
    """
    if config.task.task not in GAMES and not config.evaluate.eval_interval:
        return IdleEngine()
    if config.engine.engine == "embedded":
        return embedded_engine(chunks, config.engine)
    if config.sglang.rollout_precision == "fp8_blockwise":
        check_blocks(hf_config, max(1, config.sglang.gpus_per_server))
    ranks = ProcessRanks([parallel.rank])
    if not parallel.is_rank0:
        return SGLangEngine(ranks, _push(config, parallel, folder, tell, None, []))
    run_dir = Path(config.checkpoint.run_dir)
    longest = context_length(config, hf_config)
    # On one machine servers take the GPUs after the trainer's, unless they share them.
    first_gpu = 0 if config.sglang.colocate else parallel.world_size
    fleet, key = make_fleet(config, folder, run_dir, context_length=longest, first_gpu=first_gpu)
    io = IoThread()
    try:
        io.run(fleet.wait_ready(config.sglang.server_start_timeout_s, Progress(tell)))
        tell(f"SGLang serves at {', '.join(fleet.urls)}")
        client = functools.partial(
            Client,
            api_key=key,
            vocab_size=int(hf_config["vocab_size"]),
            context_length=longest,
            experts_shape=_experts_shape(config, hf_config),
        )
        router = client(config.sglang.router_url) if config.sglang.router_url else None
        clients = [client(url) for url in fleet.urls]
        pool = Pool(clients, config.engine.max_running_requests, config.sglang.request_timeout_s, router)
        controls = [Control(one) for one in clients]
        for control in controls:
            info = io.run(control.model_info())
            check_served(control.url, info, hf_config)
            check_precision(control.url, info, io.run(control.server_info()), config.sglang.rollout_precision)
        push = _push(config, parallel, folder, tell, io, controls, pool)
    except BaseException:
        fleet.stop()
        io.close()
        raise
    return SGLangEngine(
        ranks,
        push,
        io,
        pool,
        functools.partial(_restart, fleet, config.sglang.server_start_timeout_s, tell),
        fleet.stop,
        (lambda: _each(controls, Control.release_memory), lambda: _each(controls, Control.resume_memory))
        if config.sglang.colocate
        else None,
    )


def _push(
    config: Config,
    parallel: Parallel,
    folder: Path,
    tell: Tell,
    io: IoThread | None,
    controls: Sequence[Control],
    pool: Pool | None = None,
) -> WeightPush:
    def paused(is_paused: bool) -> None:
        if pool is not None:
            pool.is_paused = is_paused

    export = functools.partial(iterate_hf_tensors, group=parallel.control_group)
    verify = Verifier(range(1, 17), export, tell) if config.sglang.verify_weights else None
    examine = functools.partial(check_export, group=parallel.control_group)
    transport = make_transport(config, parallel, folder, io)
    return WeightPush(transport, io, controls, config.sglang.pause_mode, paused, verify, tell, examine)


def make_transport(config: Config, parallel: Parallel, folder: Path, io: IoThread | None) -> Transport:
    """What `sglang.weight_transport` names. All ranks; `io` on rank 0.

    Args:
        folder: Hugging Face folder of the policy.
    """
    sglang = config.sglang
    in_fp8 = sglang.rollout_precision == "fp8_blockwise"
    encode = all_encoded if in_fp8 else iter
    server_ranks, bucket_bytes = max(1, sglang.gpus_per_server), sglang.weight_bucket_mib * MIB
    if sglang.weight_transport == "disk":
        write = functools.partial(
            export_hf,
            hf_dir=folder,
            dtype=None if in_fp8 else torch_dtype(config.model.params_dtype),
            in_fp8=in_fp8,
            group=parallel.control_group,
            is_rank0=parallel.is_rank0,
            max_file_bytes=bucket_bytes // FILE_COPIES,
        )
        return DiskTransport(
            lambda weights, to: write(weights, out_dir=to),
            Path(config.checkpoint.run_dir) / "weights",
            parallel.is_rank0,
            flushes=sglang.pause_mode != "in_place",
        )
    if sglang.weight_transport == "tensor" and sglang.colocate:
        num_servers = len(server_urls(config)) or sglang.num_servers
        on_devices = [range(index * server_ranks, (index + 1) * server_ranks) for index in range(num_servers)]
        return HandleTransport(
            lambda weights: encode(iterate_hf_tensors(weights, dist.group.WORLD, None)),  # by the device's own backend
            bucket_bytes,
            on_devices if sglang.gpus_per_server else [(0,)] * num_servers,
            parallel.device,
            parallel.control_group,
            io,
        )
    if sglang.weight_transport == "tensor":
        return TensorTransport(
            lambda weights: encode(iterate_hf_tensors(weights, parallel.control_group)), bucket_bytes, server_ranks
        )
    on_gpus = sglang.gpus_per_server > 0
    return CollectiveTransport(
        lambda weights, stage: encode(iterate_hf_tensors(weights, stage.group, stage.speaker)),
        make_stages(parallel.pp_rank, parallel.control_group),
        parallel.control_group,
        bucket_bytes,
        backend="nccl" if on_gpus else "gloo",
        server_ranks=server_ranks,
        io=io,
        host=os.environ.get("MASTER_ADDR", "127.0.0.1") if parallel.is_rank0 else socket.gethostname(),
        device=parallel.device,
    )


def _experts_shape(config: Config, hf_config: Mapping[str, Any]) -> tuple[int, int] | None:
    if not config.train.routing_replay or "num_experts_per_tok" not in hf_config:
        return None
    return int(hf_config["num_hidden_layers"]), int(hf_config["num_experts_per_tok"])


async def _restart(fleet: Fleet, timeout_s: float, tell: Tell, server: int) -> None:
    tell(f"SGLang server {server} at {fleet.urls[server]} was lost; it is started again")
    try:
        await fleet.restart(server, timeout_s, Progress(tell))
    except EngineError as fault:
        tell(f"SGLang server {server} did not come back; while others live, the run goes on without it. {fault}")
        raise
    tell(f"SGLang server {server} is back at {fleet.urls[server]}")


async def _each(controls: Sequence[Control], call: Callable[[Control], Any]) -> None:
    await asyncio.gather(*map(call, controls))


class Progress:
    """Tells how a start is coming along, at most every ten seconds."""

    def __init__(self, tell: Tell) -> None:
        self._tell, self._next = tell, 10.0

    def __call__(self, waited_s: float, line: str) -> None:
        if waited_s >= self._next:
            self._next = waited_s + 10
            self._tell(f"SGLang starts, {waited_s:.0f} s: {line[:160]}")
