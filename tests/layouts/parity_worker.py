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

import torch
import torch.distributed as dist

from megatron_pz.platform.select import select_platform

PLATFORM = select_platform("cpu")

import hf_models  # noqa: E402
from megatron.core import dist_checkpointing, parallel_state  # noqa: E402

from megatron_pz.checkpoint.hf_export import export_hf  # noqa: E402
from megatron_pz.checkpoint.hf_import import load_hf_weights  # noqa: E402
from megatron_pz.checkpoint.store import SHARDS, load_weights  # noqa: E402
from megatron_pz.config.schema import Config, ParallelConfig  # noqa: E402
from megatron_pz.models.folder import read_hf_config  # noqa: E402
from megatron_pz.models.policy import build_policy  # noqa: E402
from megatron_pz.train.parallel import Parallel, init_parallel, shutdown  # noqa: E402

TP2, PP2, EP2 = ({f"{name}_model_parallel_size": 2} for name in ("tensor", "pipeline", "expert"))
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
}
TEMPERATURE = 0.7


def answer(model: Any, parallel: Parallel, hidden_size: int, labels: torch.Tensor | None) -> torch.Tensor | None:
    """Logits [T, V], or [2, T] for labels, of the packed row; None on stages before the last."""
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
            labels=None if labels is None else labels[None],
            temperature=TEMPERATURE,
        )
    if not parallel.is_last_stage:
        dist.send(output.contiguous(), dst=parallel_state.get_pipeline_model_parallel_next_rank())
        return None
    return output[0] if labels is None else output


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
    model = build_policy(hf, config, PLATFORM, parallel.is_first_stage, parallel.is_last_stage).eval()
    load_hf_weights([model], folder / name)
    labels = torch.arange(len(expected)) * 7 % hf_models.VOCAB_SIZE
    reference = (expected / TEMPERATURE).log_softmax(-1)
    errors = [0.0, 0.0]
    logits = answer(model, parallel, hf["hidden_size"], None)
    scored = answer(model, parallel, hf["hidden_size"], labels)
    if logits is not None and scored is not None:
        entropy = -(reference.exp() * reference).sum(-1)
        wanted = torch.stack([reference.gather(1, labels[:, None])[:, 0], entropy])
        errors = [float((logits - expected).abs().max()), float((scored - wanted).abs().max())]
    everywhere: list[Any] = [None] * parallel.world_size
    dist.all_gather_object(everywhere, errors)
    out = folder / f"exported {case}"
    export_hf([model], folder / name, out, group=parallel.control_group, is_rank0=parallel.is_rank0)
    shards = folder / f"{case}.saved" / SHARDS
    shards.mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save({"model0": model.sharded_state_dict()}, str(shards))
    before = {key: parameter.clone() for key, parameter in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    load_weights([model], folder / f"{name}.megatron")
    changed = [key for key, value in model.named_parameters() if not equal(value, before[key], key)]
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
