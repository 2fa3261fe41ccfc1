"""Megatron's Transformer Engine layers on a CPU beside its local ones, in one process.

python te_worker.py FOLDER [--real]

Transformer Engine is tests/stand_in; with --real the installed one, whose compiled functions alone are replaced
(tests/fake_engine_kernels.py).

FOLDER gets `report.json`: for each model `logits` (largest difference to `transformers`), `gradients` (largest relative difference
of a parameter's gradient to the local layers'), `bitwise` (HF tensors that did not come back bit for bit), `keys` (places in a
checkpoint that only one side has, extra states left aside); for some `crossed` (parameters that a checkpoint of the other side
fills otherwise); `fp8`, by recipe what the products saw, and the loss beside that of bfloat16 (not with --real); `waits`, of one
micro-batch and update, where the host read the device, how often; `fused`, the operations of Transformer Engine that ran; and
`updates`, losses by kind of layers, and of a trainer that was loaded after two of three.
"""

import json
import os
import sys
from collections import Counter
from itertools import product
from pathlib import Path

# Megatron's fused activation and dropout run uncompiled, Transformer Engine's Triton code interpreted.
os.environ |= {"TORCHDYNAMO_DISABLE": "1", "TRITON_INTERPRET": "1"}
IS_REAL = "--real" in sys.argv
if not IS_REAL:
    sys.path.insert(0, str(Path(__file__).parents[1] / "stand_in"))

import torch  # noqa: E402
import transformer_engine.pytorch  # noqa: E402, F401  # before the platform, which would hide it

from megatron_pz.platform.select import select_platform  # noqa: E402

LOCAL = select_platform("cpu")

import hf_models  # noqa: E402
from builders import sample  # noqa: E402
from host_waits import host_waits  # noqa: E402
from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec  # noqa: E402

if IS_REAL:
    import fake_engine_kernels
    from fake_engine_kernels import CALLED

    fake_engine_kernels.install()
else:
    from transformer_engine.common import CALLED
    from transformer_engine.pytorch import SEEN

from megatron_pz.batch.schedule import plan_update  # noqa: E402
from megatron_pz.checkpoint.extra_state import drop_absent_states, load_state  # noqa: E402
from megatron_pz.checkpoint.hf_import import load_hf_weights  # noqa: E402
from megatron_pz.checkpoint.store import CheckpointStore  # noqa: E402
from megatron_pz.config.schema import Config, ModelConfig, TrainConfig  # noqa: E402
from megatron_pz.models.folder import read_hf_config  # noqa: E402
from megatron_pz.models.policy import build_policy  # noqa: E402
from megatron_pz.models.shards import shards_of  # noqa: E402
from megatron_pz.platform.cpu import CpuPlatform  # noqa: E402
from megatron_pz.platform.cuda import CudaPlatform  # noqa: E402
from megatron_pz.platform.cuda_layers import prepare  # noqa: E402
from megatron_pz.sync.export import iterate_hf_tensors  # noqa: E402
from megatron_pz.train import step as step_module  # noqa: E402
from megatron_pz.train.deal import divisors  # noqa: E402
from megatron_pz.train.model import build_model  # noqa: E402
from megatron_pz.train.parallel import init_parallel, shutdown  # noqa: E402
from megatron_pz.train.step import Trainer  # noqa: E402

OF_THE_HOST = " in fake", "/tensor_parallel/random.py:fork"
"""Reads of what no device has: by a fake kernel, and of the CPU's own random state, which Megatron compares."""
CROSSED = ("qwen3", "qwen3_moe mixed")
ROW = torch.cat(hf_models.sequences())
POSITIONS = torch.cat([torch.arange(length) for length in hf_models.LENGTHS])
BOUNDS = torch.tensor([0, *hf_models.LENGTHS]).cumsum(0)


class Engine(CpuPlatform):
    """What `CudaPlatform` asks of Megatron, fusions of positions, permutation, activation and dropout among it."""

    def transformer_defaults(self, transformer_impl=None):
        return CudaPlatform().transformer_defaults()

    def layer_spec(self, config, vp_stage=None):
        return prepare(get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage))

    def fp8_fault(self, recipe, capability):
        return None


def answers(model):
    return model(ROW[None], POSITIONS[None], packed_seq_params=LOCAL.packed_seq_params(BOUNDS))[0]


def gradients(model):
    model.zero_grad()
    log_probs, _ = model(
        ROW[None],
        POSITIONS[None],
        packed_seq_params=LOCAL.packed_seq_params(BOUNDS),
        labels=ROW.roll(-1)[None],
    )
    log_probs.sum().backward()
    return {shard.hf_names: shard.parameter.grad for shard in shards_of([model])}


def places(model):
    return {value.key for value in model.sharded_state_dict().values() if "_extra_state" not in value.key}


def crossed(writer, reader, folder):
    """Names of parameters that a checkpoint of `writer` fills otherwise than they are there."""
    folder.mkdir()
    dist_checkpointing.save({"model0": writer.sharded_state_dict()}, str(folder))
    with torch.no_grad():
        for parameter in reader.parameters():
            parameter.zero_()
    wanted = {"model0": reader.sharded_state_dict()}
    drop_absent_states(wanted, folder)
    load_state(reader, dist_checkpointing.load(wanted, str(folder))["model0"])
    right = {shard.hf_names: shard.parameter for shard in shards_of([writer])}
    return [s.hf_names[0] for s in shards_of([reader]) if not torch.equal(s.parameter, right[s.hf_names])]


def compared(name, folder, scratch):
    hf_models.make(name, folder)
    config, hf = Config(train=TrainConfig(log_prob_chunk_tokens=5)), read_hf_config(folder)
    local, engine = (build_policy(hf, config, platform) for platform in (LOCAL, Engine()))
    for model in (local, engine):
        load_hf_weights([model], folder)
    with torch.no_grad():
        found = {"logits": float((answers(engine) - hf_models.expected_logits(folder)).abs().max())}
    pairs = [(gradient, gradients(local)[names]) for names, gradient in gradients(engine).items()]
    found["gradients"] = max(float((a - b).norm() / b.norm().clamp_min(1e-6)) for a, b in pairs)
    right = hf_models.tensors(folder)
    found["bitwise"] = [n for n, tensor in iterate_hf_tensors([engine]) if not torch.equal(tensor, right[n])]
    found["keys"] = sorted(places(local) ^ places(engine))
    if name in CROSSED:
        one, two = crossed(local, engine, scratch / "a"), crossed(engine, local, scratch / "b")
        found["crossed"] = one + two
    return found


SAMPLES = [sample((5, 9, 20), (7, 1)), sample((5, 9), (11, 3, 1), advantage=-0.5)]


def new_trainer(hf, config, parallel, platform=None):
    """A trainer, and the plan of an update of one row."""
    trainer = Trainer(build_model(hf, config, platform or Engine(), parallel), config, LOCAL, parallel)
    plan = plan_update(SAMPLES, max_tokens=64, dp_size=1, loss_aggregation="token_mean", **divisors(config))
    return trainer, plan


def tiny(kind, num_layers=2):
    """config.json with parts of whole blocks of FP8 scales."""
    sizes = {"hidden_size": 64, "vocab_size": 90, "num_hidden_layers": num_layers}
    experts = hf_models.EXPERTS if kind == "qwen3_moe" else {"head_dim": 16}
    return hf_models.SMALL | experts | sizes | {"model_type": kind, "norm_topk_prob": True, "rope_theta": 1e4}


def fp8(parallel):
    """By recipe: the products that it saw, and the loss of one update, which these plain products leave as it was."""
    found = {}
    for recipe in ("off", "blockwise", "tensorwise", "delayed", "mxfp8"):
        ends = {} if recipe in ("off", "delayed") else {"first_last_layers_bf16": True}
        config = Config(
            model=ModelConfig(init="random", params_dtype="bfloat16", fp8=recipe),
            transformer=ends | ({} if recipe == "off" else {"num_layers_at_end_in_bf16": 0}),
        )
        SEEN.clear()
        trainer, plan = new_trainer(tiny("qwen3_moe"), config, parallel)
        loss = trainer.step(plan, lr_step=1).loss
        found[recipe] = {
            "seen": sorted(set(SEEN)),
            "products": len(SEEN),
            "loss": loss,
            "recipe": [trainer.chunks[0].config.fp8, trainer.chunks[0].config.fp8_recipe],
            "row": plan.micro_batches[0][0].num_tokens,
        }
    return found


def products(parallel):
    """FP8 products of an update of three dense layers, by how many at which end are in bfloat16."""
    found = {}
    for first, last in ((0, 0), (1, 0), (0, 1), (1, 1)):
        ends = {"num_layers_at_start_in_bf16": first, "num_layers_at_end_in_bf16": last}
        config = Config(
            model=ModelConfig(init="random", params_dtype="bfloat16", fp8="blockwise"),
            transformer=ends | {"first_last_layers_bf16": True},
        )
        SEEN.clear()
        trainer, plan = new_trainer(tiny("qwen3", num_layers=3), config, parallel)
        trainer.step(plan, lr_step=1)
        found[f"{first} {last}"] = len(SEEN)
    return found


def waits(parallel):
    """By model, the places in which the forward and backward of a row waits, and how often."""
    found, real = {}, step_module.run_schedule

    def watched(*args, **kwargs):
        with host_waits() as seen:
            result = real(*args, **kwargs)
        found[kind] = Counter(wait for wait in seen if not wait.endswith(OF_THE_HOST))
        return result

    step_module.run_schedule = watched
    for kind in ("qwen3", "qwen3_moe"):
        trainer, plan = new_trainer(
            tiny(kind), Config(model=ModelConfig(init="random", params_dtype="bfloat16")), parallel
        )
        trainer.step(plan, lr_step=1)
    step_module.run_schedule = real
    return found


def updates(parallel, folder):
    """Losses of three updates by either kind of layers; of a trainer that rested and was loaded after two, and weights that differ."""
    found = {}
    for kind, dtype in product(("qwen3", "qwen3_moe"), ("float32", "bfloat16")):
        config = Config(
            model=ModelConfig(init="random", params_dtype=dtype), train=TrainConfig(lr=1e-2, lr_decay_style="constant")
        )
        local, plan = new_trainer(tiny(kind), config, parallel, LOCAL)
        engine, _ = new_trainer(tiny(kind), config, parallel)
        left = {"local": [local.step(plan, lr_step=step).loss for step in (1, 2, 3)]}
        right = [engine.step(plan, lr_step=step).loss for step in (1, 2)]
        store = CheckpointStore(folder / f"{kind} {dtype} updates", keep=1)
        store.save(2, engine.chunks, engine.optimizer, "{}")
        right.append(engine.step(plan, lr_step=3).loss)
        loaded, _ = new_trainer(tiny(kind), config, parallel)
        store.load(2, loaded.chunks, loaded.optimizer)
        loaded.sleep()
        loaded.wake()
        left |= {"engine": right, "loaded": loaded.step(plan, lr_step=3).loss}
        wanted = {shard.hf_names: shard.parameter for shard in shards_of(engine.chunks)}
        left["differ"] = [
            s.hf_names[0] for s in shards_of(loaded.chunks) if not torch.equal(s.parameter, wanted[s.hf_names])
        ]
        found[f"{kind} {dtype}"] = left | {"optimizer": type(_innermost(engine.optimizer)).__module__}
    return found


def _innermost(optimizer):
    """torch's optimizer or Transformer Engine's, below Megatron's."""
    below = getattr(optimizer, "chained_optimizers", [optimizer])[0]
    return below.optimizer


def main(folder):
    parallel = init_parallel(Config().parallel, LOCAL, seed=1)
    report = {name: compared(name, folder / name, folder / f"{name} saved") for name in hf_models.MODELS}
    if not IS_REAL:
        report |= {"fp8": fp8(parallel), "products": products(parallel)}
    report |= {"waits": waits(parallel), "updates": updates(parallel, folder), "fused": sorted(CALLED)}
    shutdown()
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    root = Path(sys.argv[1])
    for name in CROSSED:
        (root / f"{name} saved").mkdir(parents=True)
    main(root)
