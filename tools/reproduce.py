"""Make a run again from its run directory, and compare every number.

    python tools/reproduce.py RUN_DIR [--steps N] [--out DIR]

Settings are those of RUN_DIR/config.toml, the ranks those of RUN_DIR/run.json; paths in them are seen from the folder that this is
called in, as in the run. With --steps only the first N steps are made again. On the CPU, with the embedded engine and one layout,
metrics, rollouts and answers are equal to the last bit; SGLang batches requests as they come, so its runs are not.
Exit status: 0 the same, 1 not the same (what differs is told), 2 after an error that a user can mend.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_pz.config.load import read_config, to_toml
from megatron_pz.config.schema import Config
from megatron_pz.errors import CheckpointError, MegatronPZError
from megatron_pz.report.jsonl import METRICS_FILE, read_rows
from megatron_pz.report.reproduction import differences, different_grounds


def main(argv: Sequence[str]) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--steps", type=int, default=0, help="make only so many again; 0: all that the run made")
    parser.add_argument("--out", type=Path, help="where the new run is kept; without it, nowhere")
    own = parser.parse_args(list(argv))
    try:
        before = _about(own.run_dir)
        made = max((int(row["step"]) for row in read_rows(own.run_dir / METRICS_FILE)), default=0)
        if not made:
            raise CheckpointError(f"{own.run_dir / METRICS_FILE} has no step; there is nothing to make again.")
        steps = min(own.steps or made, made)
        config = read_config(own.run_dir / "config.toml")
        with tempfile.TemporaryDirectory() as scratch:
            new = own.out or Path(scratch) / "run"
            settings = Path(scratch) / "config.toml"
            settings.write_text(to_toml(_again(config, steps, new)), encoding="utf-8")
            ranks = int(before.get("world_size", 1))
            launcher = (
                ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
            )
            done = subprocess.run([sys.executable, *launcher, "-m", "megatron_pz", str(settings)], check=False)
            if done.returncode:
                return done.returncode
            grounds = different_grounds(before, _about(new))
            found = differences(own.run_dir, new, steps)
    except MegatronPZError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 2
    for line in grounds:
        sys.stdout.write(f"other grounds: {line}\n")
    for line in found:
        sys.stdout.write(f"differs: {line}\n")
    sys.stdout.write(f"{'NOT the same' if found else 'the same'} up to step {steps}\n")
    return 1 if found else 0


def _again(config: Config, steps: int, run_dir: Path) -> Config:
    """`config` for its first `steps` steps, in another folder, with the learning rates that it had."""
    train = config.train
    decay = train.lr_decay_iters or train.train_iters
    return dataclasses.replace(
        config,
        train=dataclasses.replace(train, train_iters=steps, lr_decay_iters=decay),
        checkpoint=dataclasses.replace(config.checkpoint, run_dir=str(run_dir), save_interval=0, export_hf=False),
        report=dataclasses.replace(config.report, wandb_project="", tensorboard=False, write_page=False),
    )


def _about(run_dir: Path) -> dict[str, Any]:
    try:
        about = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{run_dir} has no readable run.json ({error}); it is no run directory.") from error
    assert isinstance(about, dict)
    return about


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
