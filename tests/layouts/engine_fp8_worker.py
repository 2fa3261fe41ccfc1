"""FP8 training by the real Transformer Engine's Python on a CPU, its compiled functions in plain torch (tests/fake_engine_fp8.py).

python engine_fp8_worker.py FOLDER

FOLDER gets `report.json`: by model, recipe and whether weights are kept in FP8: `losses` of three updates, `bfloat16` (the same without
FP8), `seen` (quantisers whose tensors were multiplied), `kept` (classes of the model's weights), `loaded` (the third loss by a trainer
that rested and was loaded after two) and `differ` (HF tensors that it has otherwise).
"""

import json
import sys
from itertools import product
from pathlib import Path

import te_worker as worker  # with --real
import torch
from fake_engine_fp8 import SEEN

from megatron_pz.checkpoint.store import CheckpointStore
from megatron_pz.config.schema import Config, ModelConfig, TrainConfig
from megatron_pz.sync.export import iterate_hf_tensors
from megatron_pz.train.parallel import init_parallel, shutdown


def learned(kind, recipe, keeps, parallel, folder):
    config = Config(
        model=ModelConfig(init="random", params_dtype="bfloat16", fp8=recipe, fp8_param_gather=keeps),
        train=TrainConfig(lr=1e-3, lr_decay_style="constant"),
        transformer={
            "moe_permute_fusion": False
        },  # Triton's interpreter would take minutes for the 128 tokens of a block
    )
    SEEN.clear()
    trainer, plan = worker.new_trainer(worker.tiny(kind), config, parallel)
    found = {"kept": sorted({type(parameter.data).__name__ for parameter in trainer.chunks[0].parameters()})}
    found["losses"] = [trainer.step(plan, lr_step=step).loss for step in (1, 2)]
    store = CheckpointStore(folder / f"{kind} {recipe} {keeps}", keep=1)
    store.save(2, trainer.chunks, trainer.optimizer, "{}")
    found["losses"].append(trainer.step(plan, lr_step=3).loss)
    found["seen"] = sorted({name for name, _ in SEEN})
    loaded, _ = worker.new_trainer(worker.tiny(kind), config, parallel)
    store.load(2, loaded.chunks, loaded.optimizer)
    loaded.sleep()
    loaded.wake()
    found["loaded"] = loaded.step(plan, lr_step=3).loss
    right = dict(iterate_hf_tensors(trainer.chunks))
    found["differ"] = [
        name for name, tensor in iterate_hf_tensors(loaded.chunks) if not torch.equal(tensor, right[name])
    ]
    return found


def main(folder):
    parallel = init_parallel(Config().parallel, worker.LOCAL, seed=1)
    report = {}
    for kind in ("qwen3", "qwen3_moe"):
        report[f"{kind} off"] = learned(kind, "off", False, parallel, folder)
        for recipe, keeps in product(("blockwise", "tensorwise", "delayed"), (False, True)):
            if (kind, recipe, keeps) != ("qwen3_moe", "delayed", True):  # refused: it could not be loaded
                report[f"{kind} {recipe} {keeps}"] = learned(kind, recipe, keeps, parallel, folder)
    shutdown()
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
