"""Models of `transformers` in several layouts: their logits, and the folder exported again. One run of torchrun.

torchrun --nproc-per-node 2 parity_worker.py FOLDER

FOLDER holds `logits.pt` ({model: expected logits}), a folder a model and its conversion `MODEL.megatron`. Rank 0 writes
`report.json`: for each case `logits` (largest difference), `log_probs` (the same for labels under temperature 0.7), `bitwise`
(names of tensors that export did not give back bit for bit), `loaded` (names of parameters that the conversion fills
otherwise than the folder does). `CASE.saved/shards` is the model as this layout saves it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_pz.platform.select import select_platform

PLATFORM = select_platform("cpu")

import hf_models  # noqa: E402
from megatron.core import dist_checkpointing, parallel_state  # noqa: E402

from megatron_pz.batch.packing import micro_batch  # noqa: E402
from megatron_pz.checkpoint.hf_export import export_hf  # noqa: E402
from megatron_pz.checkpoint.hf_import import load_hf_weights  # noqa: E402
from megatron_pz.checkpoint.store import SHARDS, load_weights  # noqa: E402
from megatron_pz.config.schema import Config, ParallelConfig  # noqa: E402
from megatron_pz.models.folder import read_hf_config  # noqa: E402
from megatron_pz.models.shards import unwrap  # noqa: E402
from megatron_pz.train.deal import divisors  # noqa: E402
from megatron_pz.train.forward import run_schedule, whole_rows  # noqa: E402
from megatron_pz.train.model import build_model  # noqa: E402
from megatron_pz.train.parallel import Parallel, init_parallel, shutdown  # noqa: E402
from megatron_pz.types import Sample  # noqa: E402

TP2, PP2, EP2 = ({f"{name}_model_parallel_size": 2} for name in ("tensor", "pipeline", "expert"))
CP2 = {"context_parallel_size": 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3 tp2": ("qwen3", TP2),
    "qwen3 tp2 sp": ("qwen3", TP2 | {"sequence_parallel": True}),
    "qwen3 pp2": ("qwen3", PP2),  # tied: the last stage has a copy of the embedding
    "qwen3 untied pp2": ("qwen3 untied", PP2),
    "llama tp2": ("llama", TP2),
    "smollm3 tp2": ("smollm3", TP2),
    "smollm3 pp2": ("smollm3", PP2),
    "qwen3_moe ep2": ("qwen3_moe", EP2),
    "qwen3_moe mixed ep2": ("qwen3_moe mixed", EP2),
    "qwen3_moe tp2": ("qwen3_moe", TP2),
    "qwen3_moe tp2 ep2": ("qwen3_moe", TP2 | EP2 | {"sequence_parallel": True}),
    "qwen3_moe mixed pp2": ("qwen3_moe mixed", PP2),
    "qwen3 dp2": ("qwen3", {}),
    "qwen3_moe mixed cp2": ("qwen3_moe mixed", CP2),
    "smollm3 cp2": ("smollm3", CP2),
    "smollm3 vpp2": ("smollm3", PP2 | {"virtual_pipeline_model_parallel_size": 2}),
}
TEMPERATURE = 0.7


def answer(model: Any, parallel: Parallel, hidden_size: int) -> torch.Tensor | None:
    """Logits [T, V] of the packed row; None on stages before the last."""
    row = torch.cat(hf_models.sequences())
    bounds = torch.tensor([0, *hf_models.LENGTHS]).cumsum(0)
    if parallel.pp_size > 1 and not parallel.is_first_stage:
        received = torch.empty(len(row), 1, hidden_size)
        dist.recv(received, src=parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(received)
    with torch.no_grad():
        output = model(
            row[None],
            torch.cat([torch.arange(n) for n in hf_models.LENGTHS])[None],
            packed_seq_params=PLATFORM.packed_seq_params(bounds),
        )
    if not parallel.is_last_stage:
        dist.send(output.contiguous(), dst=parallel_state.get_pipeline_model_parallel_next_rank())
        return None
    return output[0]


def scored(chunks: Any, config: Config, parallel: Parallel, labels: torch.Tensor) -> torch.Tensor | None:
    """[2, T] for labels, by way of the schedule, which shares sequences out and runs chunks in turns."""
    ids = [tuple(row.tolist()) for row in hf_models.sequences()]
    zeros = [(0.0,) * len(row) for row in ids]
    samples = [Sample(row, zero, zero, 0.0, None, "") for row, zero in zip(ids, zeros, strict=True)]
    layout = divisors(config)
    count = layout.pop("count_multiple")
    batch = micro_batch(samples, [np.array(zero) for zero in zeros], range(len(ids)), **layout)
    at = np.concatenate([start + np.arange(len(row)) for start, row in zip(batch.cu_seqlens, ids, strict=False)])
    batch.labels[at], batch.loss_weights[at] = labels.numpy(), 1.0
    batches = [batch] + [micro_batch([], [], [], **layout)] * (count - 1)

    def keep(_: Any, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        return output.sum(), torch.tensor(1, dtype=torch.int), output.T.numpy()

    with torch.no_grad():
        found = run_schedule(chunks, batches, keep, PLATFORM, temperature=TEMPERATURE, forward_only=True)
    rows = whole_rows(found, batches)
    return torch.from_numpy(rows[0][at]).T if rows else None


def equal(value: torch.Tensor, before: torch.Tensor, key: str) -> bool:
    """Bit for bit; where the vocabulary is padded further than the conversion's, the padding is nobody's."""
    if "embedding" in key or "output_layer" in key:
        is_known = ~before.isnan().any(1) & (before != 0).any(1)
        return torch.equal(value[is_known], before[is_known])
    return torch.equal(value, before)


def run(case: str, folder: Path, expected: torch.Tensor) -> dict[str, Any]:
    name, layout = CASES[case]
    config = Config(parallel=ParallelConfig(**layout))
    parallel = init_parallel(config.parallel, PLATFORM, seed=1)
    hf = read_hf_config(folder / name)
    chunks = build_model(hf, config, PLATFORM, parallel)
    load_hf_weights(chunks, folder / name)
    for chunk in chunks:
        chunk.eval()
    labels = torch.arange(len(expected)) * 7 % hf_models.VOCAB_SIZE
    reference = (expected / TEMPERATURE).log_softmax(-1)
    errors = [0.0, 0.0]
    logits, found_log_probs = expected, scored(chunks, config, parallel, labels)
    if config.parallel.context_parallel_size == parallel.num_chunks == 1:
        logits = answer(unwrap(chunks[0]), parallel, hf["hidden_size"])
    if logits is not None and found_log_probs is not None:
        entropy = -(reference.exp() * reference).sum(-1)
        wanted = torch.stack([reference.gather(1, labels[:, None])[:, 0], entropy])
        errors = [float((logits - expected).abs().max()), float((found_log_probs - wanted).abs().max())]
    everywhere: list[Any] = [None] * parallel.world_size
    dist.all_gather_object(everywhere, errors)
    out = folder / f"exported {case}"
    export_hf(chunks, folder / name, out, group=parallel.control_group, is_rank0=parallel.is_rank0)
    shards = folder / f"{case}.saved" / SHARDS
    shards.mkdir(parents=True, exist_ok=True)
    models = [unwrap(chunk) for chunk in chunks]
    dist_checkpointing.save({f"model{i}": model.sharded_state_dict() for i, model in enumerate(models)}, str(shards))
    named = [(key, parameter) for model in models for key, parameter in model.named_parameters()]
    before = [parameter.clone() for _, parameter in named]
    with torch.no_grad():
        for _, parameter in named:
            parameter.fill_(float("nan"))
    load_weights(chunks, folder / f"{name}.megatron")
    changed = [key for (key, value), old in zip(named, before, strict=True) if not equal(value, old, key)]
    unequal: list[Any] = [None] * parallel.world_size
    dist.all_gather_object(unequal, changed)
    parallel_state.destroy_model_parallel()
    found: dict[str, Any] = {"logits": max(e[0] for e in everywhere), "log_probs": max(e[1] for e in everywhere)}
    if parallel.is_rank0:
        source, again = hf_models.tensors(folder / name), hf_models.tensors(out)
        different = [n for n in source.keys() & again.keys() if not torch.equal(source[n], again[n])]
        found["loaded"] = sorted({key for keys in unequal for key in keys})
        found["bitwise"] = sorted([*(source.keys() ^ again.keys()), *different])
    return found


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    expected = torch.load(folder / "logits.pt")
    report = {case: run(case, folder, expected[name]) for case, (name, _) in CASES.items()}
    if dist.get_rank() == 0:
        (folder / "report.json").write_text(json.dumps(report))
    shutdown()


if __name__ == "__main__":
    main()
