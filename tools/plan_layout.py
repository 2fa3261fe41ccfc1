"""What a layout takes, before a job is queued: memory, traffic, time; and which layouts fit if it does not. No GPU, no weights.

    python tools/plan_layout.py CONFIG.toml --world-size 64 [--gpu-memory-gib 139 ...] [--flag value ...]

Takes a run's own TOML file and flags. --world-size counts the ranks that train. The model's config.json is that of its folder, or
of examples/models where only its name is known; every assumption about machines and texts is a flag, printed with the plan.
Exit status 0 where the layout fits, 1 where it does not.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_pz.config.load import load_config
from megatron_pz.config.rules import validate
from megatron_pz.config.schema import Config
from megatron_pz.errors import LayoutError, MegatronPZError
from megatron_pz.platform.select import select_platform

MODELS = Path(__file__).resolve().parents[1] / "examples" / "models"


def main(argv: Sequence[str]) -> int:
    """See the module; 2 after an error that a user can mend."""
    select_platform("cpu")  # before Megatron is imported
    from megatron_pz.plan.assumptions import Assumptions
    from megatron_pz.plan.layouts import NUM_PROPOSED, Machines, Planner
    from megatron_pz.plan.stages import build_stages
    from megatron_pz.plan.table import proposals, report

    parser = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False)
    parser.add_argument("--world-size", type=int, required=True, help="ranks that train")
    parser.add_argument(
        "--server-nodes", type=int, default=1, help="nodes of servers that do not share the trainer's GPUs"
    )
    parser.add_argument("--platform", choices=("cuda", "cpu"), default="cuda", help="whose layers keep the activations")
    parser.add_argument("--propose", action="store_true", help="name other layouts even where this one fits")
    for name, default in Assumptions.flags().items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    own, rest = parser.parse_known_args(list(argv))
    assumed = Assumptions(**{name: getattr(own, name) for name in Assumptions.flags()})
    machines = Machines(own.world_size, own.server_nodes, own.platform == "cuda", assumed)
    try:
        config = load_config(rest)
        hf_config = read_model(config)
        planner = Planner(hf_config, config, machines)
        try:
            validate(config, machines.world_size)
            planner.transformer(config)
        except LayoutError as fault:
            sys.stdout.write(f"cannot be shared out: {fault}\n\n{proposals(planner.propose(), NUM_PROPOSED)}\n")
            return 1
        plan = planner.plan(config, build_stages(hf_config, config, machines.world_size))
        sys.stdout.write(report(plan, machines, planner.recomputing(config)) + "\n")
        if plan.faults or own.propose:
            sys.stdout.write(f"\n{proposals(planner.propose(), NUM_PROPOSED)}\n")
    except MegatronPZError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 2
    return 1 if plan.faults else 0


def read_model(config: Config) -> dict[str, Any]:
    """config.json of the run's model."""
    from megatron_pz.models.folder import read_hf_config

    name = config.model.hf_model
    known = MODELS / Path(name).name / "config.json"
    if not Path(name).expanduser().is_dir() and known.is_file():
        return dict(json.loads(known.read_text(encoding="utf-8")))
    return read_hf_config(name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
