"""What the GPU tests compute, on whichever platform: run on a GPU by `test_gpu.py`, on a CPU by `tests/train/test_gpu_cases.py`.

python tests/gpu/cases.py CASE FOLDER OUT      the same on the CPU in float32, in a process that sees no GPU; OUT is torch's file

One process has one platform, so what is compared with the CPU comes from a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import hf_models
from builders import sample

from megatron_pz.config.schema import Config, ModelConfig, TrainConfig
from megatron_pz.platform.base import Platform
from megatron_pz.platform.select import select_platform

Tensors = dict[str, torch.Tensor]
BF16_GRADIENTS = 0.06
"""Relative in norm, of a model with `calm` weights: 0.035 is the most that is seen on a CPU."""
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
"""Of models for updates: FP8 takes multiples of 16."""


def settings(impl: str = "local", dtype: str = "float32", **train: Any) -> Config:
    """Of a model whose weights come from a folder."""
    fixed: dict[str, Any] = {"lr": 1e-3, "lr_decay_style": "constant", "log_prob_chunk_tokens": 5}
    return Config(
        model=ModelConfig(params_dtype=dtype),  # type: ignore[arg-type]
        train=TrainConfig(**{**fixed, **train}),
        transformer={"transformer_impl": impl},
    )


@contextmanager
def alone(platform: Platform) -> Iterator[Any]:
    """The groups of a world of one."""
    from megatron_pz.train.parallel import init_parallel, shutdown

    try:
        yield init_parallel(Config().parallel, platform, 1)
    finally:
        shutdown()


def built(platform: Platform, folder: Path, config: Config) -> Any:
    from megatron_pz.checkpoint.hf_import import load_hf_weights
    from megatron_pz.models.folder import read_hf_config
    from megatron_pz.models.policy import build_policy

    model = build_policy(read_hf_config(folder), config, platform)
    load_hf_weights([model], folder)
    return model


def row(platform: Platform) -> dict[str, Any]:
    """The packed sequences of `hf_models`, as arguments of the policy."""
    bounds = torch.tensor([0, *hf_models.LENGTHS]).cumsum(0)
    positions = torch.cat([torch.arange(length) for length in hf_models.LENGTHS])
    return {
        "input_ids": torch.cat(hf_models.sequences())[None].to(platform.device),
        "position_ids": positions[None].to(platform.device),
        "packed_seq_params": platform.packed_seq_params(bounds),
    }


def make(name: str, folder: Path) -> None:
    """Write the model `name` of `hf_models`, with heads of 16: kernels on a GPU take multiples of 8."""
    hf_models.make(name, folder, hidden_size=SIZES["hidden_size"])


def logits_error(platform: Platform, name: str, folder: Path, config: Config) -> float:
    """Of the logits beside those of `transformers` in float32, relative in norm."""
    make(name, folder)
    with alone(platform), torch.no_grad():
        model = built(platform, folder, config)
        model = model.bfloat16() if config.model.params_dtype == "bfloat16" else model
        found = model(**row(platform))[0].float().cpu()
    expected = hf_models.expected_logits(folder)
    return float((found - expected).norm() / expected.norm())


def gradients(platform: Platform, folder: Path, config: Config) -> Tensors:
    """Of the summed log-probs of the row, by HF name of a parameter's first tensor."""
    from megatron_pz.models.shards import shards_of

    with alone(platform):
        model, fields = built(platform, folder, config), row(platform)
        log_probs, _ = model(**fields, labels=fields["input_ids"].roll(-1, 1))
        log_probs.sum().backward()
        return {
            s.hf_names[0]: s.parameter.grad.float().cpu() for s in shards_of([model]) if s.parameter.grad is not None
        }


def calm(folder: Path) -> Path:
    """`folder` with a quarter of each matrix, for gradients in bfloat16.

    With the weights of `hf_models` as they are, attention without a norm of queries and keys is so sharp that the rounding of a
    score chooses who is attended to: the gradients of smollm3 in bfloat16 are 14% off float32 on a CPU, which says nothing about
    the code. At a half it is 4.1%, at a quarter 1.1% (qwen3 3.5%, qwen3_moe 0.8%). At a tenth the router's probabilities are so
    close that a token goes to other experts.
    """
    from safetensors.torch import load_file, save_file

    for file in folder.glob("*.safetensors"):
        tensors = {name: tensor / 4 if tensor.dim() == 2 else tensor for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


def largest_error(found: Tensors, expected: Tensors) -> float:
    """Over all parameters together, relative in norm."""
    assert found.keys() == expected.keys()
    off = sum(float((found[name] - expected[name]).square().sum()) for name in expected)
    return float((off / sum(float(values.square().sum()) for values in expected.values())) ** 0.5)


def updates(
    platform: Platform, hf: dict[str, Any], config: Config, *, rests: bool = False, replays: bool = False
) -> tuple[list[float], Tensors]:
    """Losses of three updates on random weights, and the weights after them.

    Args:
        rests: the trainer gives its memory away before each update and takes it back.
        replays: each token goes to named experts.
    """
    import numpy as np

    from megatron_pz.batch.schedule import plan_update
    from megatron_pz.models.shards import shards_of
    from megatron_pz.train.deal import divisors
    from megatron_pz.train.model import build_model
    from megatron_pz.train.step import Trainer

    config = replace(config, model=replace(config.model, init="random"))
    samples = [sample((5, 9, 20), (7, 1)), sample((5, 9), (11, 3, 1), advantage=-0.5)]
    if replays:
        chosen = np.array(
            [[[at % 8, (at + 3) % 8, (at + 5) % 8]] * hf["num_hidden_layers"] for at in range(4)], np.int16
        )
        samples = [replace(one, routed_experts=chosen) for one in samples]
    with alone(platform) as parallel:
        trainer = Trainer(build_model(hf, config, platform, parallel), config, platform, parallel)
        plan = plan_update(
            samples, max_tokens=64, dp_size=1, loss_aggregation="token_mean", **cast(Any, divisors(config))
        )
        losses = []
        for step in (1, 2, 3):
            if rests:
                trainer.sleep()
                platform.release_unused()
                trainer.wake()
            losses.append(trainer.step(plan, lr_step=step).loss)
        return losses, {s.hf_names[0]: s.parameter.detach().float().cpu() for s in shards_of(trainer.chunks)}


def tiny(kind: str) -> dict[str, Any]:
    """config.json of a model of `SIZES`."""
    moe = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "norm_topk_prob": True}
    common = hf_models.SMALL | SIZES | {"model_type": kind, "rope_theta": 1e4, "tie_word_embeddings": True}
    return common | (moe if kind == "qwen3_moe" else {})


def nan_step(platform: Platform, config: Config) -> bool:
    """Whether a weight that is no number has every rank refuse the update, and no other weight changes."""
    from megatron_pz.batch.schedule import plan_update
    from megatron_pz.errors import NumericsError
    from megatron_pz.train.deal import divisors
    from megatron_pz.train.model import build_model
    from megatron_pz.train.step import Trainer

    config = replace(config, model=replace(config.model, init="random"))
    with alone(platform) as parallel:
        trainer = Trainer(build_model(tiny("qwen3"), config, platform, parallel), config, platform, parallel)
        plan = plan_update(
            [sample()], max_tokens=64, dp_size=1, loss_aggregation="token_mean", **cast(Any, divisors(config))
        )
        with torch.no_grad():
            next(iter(trainer.chunks[0].parameters()))[5, 0] = torch.nan
        before = [parameter.detach().clone() for parameter in trainer.chunks[0].parameters()]
        try:
            trainer.step(plan, lr_step=1)
        except NumericsError:
            after = list(trainer.chunks[0].parameters())
            return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, after, strict=True))
        return False


def saved(platform: Platform, folder: Path, config: Config, out: Path) -> None:
    """A checkpoint of the folder's weights, without an optimizer."""
    from megatron.core import dist_checkpointing

    from megatron_pz.checkpoint.manifest import fingerprint, write_manifest
    from megatron_pz.checkpoint.store import SHARDS

    with alone(platform):
        model = built(platform, folder, config)
        (out / SHARDS).mkdir(parents=True)
        dist_checkpointing.save({"model0": model.sharded_state_dict()}, str(out / SHARDS))
        write_manifest(out, {"model": fingerprint(model.hf_config)})


def loaded(platform: Platform, folder: Path, config: Config, checkpoint: Path) -> Tensors:
    """HF tensors of a model that was filled from the checkpoint."""
    from megatron_pz.checkpoint.store import load_weights
    from megatron_pz.models.folder import read_hf_config
    from megatron_pz.models.policy import build_policy
    from megatron_pz.sync.export import iterate_hf_tensors

    with alone(platform):
        model = build_policy(read_hf_config(folder), config, platform)
        load_weights([model], checkpoint)
        return {name: tensor.float().cpu() for name, tensor in iterate_hf_tensors([model])}


def on_cpu(case: str, folder: Path, out: Path) -> Any:
    """`case` in a process that sees no GPU."""
    env = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, __file__, case, str(folder), str(out)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out) if out.is_file() else None


def main(case: str, folder: Path, out: Path) -> None:
    platform = select_platform("cpu")
    if case == "gradients":
        torch.save(gradients(platform, folder, settings()), out)
    elif case == "replay":
        torch.save(updates(platform, tiny("qwen3_moe"), settings(routing_replay=True), replays=True)[0], out)
    elif case == "save":
        saved(platform, folder, settings(), out)
    elif case == "load":  # the checkpoint lies beside OUT
        torch.save(loaded(platform, folder, settings(), out.with_suffix(".checkpoint")), out)
    else:
        raise SystemExit(f"no case {case}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
