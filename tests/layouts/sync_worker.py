"""What each pipeline stage's first rank would hand to servers, in layouts of four ranks. One run of torchrun.

torchrun --nproc-per-node 4 sync_worker.py FOLDER

FOLDER holds a folder a model. For each case `CASE.STAGE.safetensors` are the stage's tensors, and rank 0 writes `report.json`:
for each case `speakers` and `digests` (of the whole export, as a server would tell them).
"""

from __future__ import annotations

import io
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_pz.platform.select import select_platform

PLATFORM = select_platform("cpu")

from megatron.core import parallel_state  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from megatron_pz.checkpoint.hf_import import load_hf_weights  # noqa: E402
from megatron_pz.config.schema import Config, ParallelConfig  # noqa: E402
from megatron_pz.models.folder import read_hf_config  # noqa: E402
from megatron_pz.sync.collective import make_stages  # noqa: E402
from megatron_pz.sync.digests import server_digests  # noqa: E402
from megatron_pz.sync.expected import check_export  # noqa: E402
from megatron_pz.sync.export import iterate_hf_tensors  # noqa: E402
from megatron_pz.train.model import build_model  # noqa: E402
from megatron_pz.train.parallel import init_parallel, shutdown  # noqa: E402

TP2, PP2, EP2 = ({f"{name}_model_parallel_size": 2} for name in ("tensor", "pipeline", "expert"))
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3 tp2 pp2": ("qwen3", TP2 | PP2),  # tied: the last stage has a copy of the embedding
    "qwen3 untied dp2 pp2": ("qwen3 untied", PP2),
    "qwen3_moe tp2 ep2 pp2": ("qwen3_moe", TP2 | EP2 | PP2 | {"sequence_parallel": True}),
    "qwen3_moe mixed ep2 pp2": ("qwen3_moe mixed", EP2 | PP2),
    "smollm3 cp2 vpp2": ("smollm3", PP2 | {"context_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "qwen3_moe tp2 sp etp2 ep2": (
        "qwen3_moe",
        TP2 | EP2 | {"sequence_parallel": True, "expert_tensor_parallel_size": 2},
    ),
}


class WithoutNumbers(pickle.Pickler):
    """Fails at a tensor that has numbers."""

    def reducer_override(self, thing: Any) -> Any:
        assert not isinstance(thing, torch.Tensor) or thing.is_meta, (
            "as an object it goes through host memory, also between GPUs"
        )
        return NotImplemented


def watched(gather: Any) -> Any:
    """`gather`, a collective of objects, that takes no weights."""

    def checked(receives: Any, thing: Any, *more: Any, **named: Any) -> Any:
        WithoutNumbers(io.BytesIO()).dump(thing)
        return gather(receives, thing, *more, **named)

    return checked


def run(case: str, folder: Path) -> dict[str, Any]:
    name, layout = CASES[case]
    config = Config(parallel=ParallelConfig(**layout))
    parallel = init_parallel(config.parallel, PLATFORM, seed=1)
    hf = read_hf_config(folder / name)
    chunks = build_model(hf, config, PLATFORM, parallel)
    load_hf_weights(chunks, folder / name)
    check_export(chunks, parallel.control_group)
    stages = make_stages(parallel.pp_rank, parallel.control_group)
    for stage in stages:
        if dist.get_rank() in stage.ranks:
            held = {
                name: tensor.contiguous().clone()
                for name, tensor in iterate_hf_tensors(chunks, stage.group, stage.speaker)
            }
            assert bool(held) == (dist.get_rank() == stage.speaker)
            if held:
                save_file(held, folder / f"{case}.{stage.index}.safetensors")
    everywhere = server_digests(iterate_hf_tensors(chunks, parallel.control_group, None), torch.float32)
    digests = server_digests(iterate_hf_tensors(chunks, parallel.control_group), torch.float32)
    all_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(all_ranks, everywhere)
    assert all(found == all_ranks[0] for found in all_ranks) and (dist.get_rank() or everywhere == digests)
    parallel_state.destroy_model_parallel()
    return {"speakers": [stage.speaker for stage in stages], "digests": digests}


def main() -> None:
    torch.set_num_threads(1)
    dist.all_gather_object = watched(dist.all_gather_object)
    folder = Path(sys.argv[1])
    report = {case: run(case, folder) for case in CASES}
    if dist.get_rank() == 0:
        (folder / "report.json").write_text(json.dumps(report))
    shutdown()


if __name__ == "__main__":
    main()
