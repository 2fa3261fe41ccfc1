"""Every fault of a run before it begins: `python -m megatron_pz doctor CONFIG.toml`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_pz.config.load import load_config
from megatron_pz.doctor.checks import LIGHT, WHOLE, Check
from megatron_pz.doctor.patient import Patient
from megatron_pz.errors import MegatronPZError
from megatron_pz.platform.versions import check_versions

USAGE = """\
python -m megatron_pz doctor CONFIG.toml [--world-size N] [--platform cuda] [--gpu-memory-gib G] [--flag value ...]"""


@dataclass(frozen=True)
class Fault:
    """`told` says what was found, what is wanted and the way out."""

    thing: str
    told: str


def examine(patient: Patient, checks: Mapping[str, Check]) -> list[Fault]:
    """The faults that `checks` find. What several checks stumble over is told by the first."""
    told: dict[str, str] = {}
    for thing, check in checks.items():
        try:
            for fault in check(patient):
                told.setdefault(fault, thing)
        except MegatronPZError as error:
            for line in str(error).splitlines():
                told.setdefault(line, thing)
    return [Fault(thing, fault) for fault, thing in told.items()]


def main(argv: Sequence[str]) -> int:
    """Tell every fault on standard output; 0: there is none, 2: there are some."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_pz doctor", description=__doc__, usage=USAGE, allow_abbrev=False
    )
    parser.add_argument(
        "--world-size", type=int, default=int(os.environ.get("WORLD_SIZE", "1")), help="ranks that will train (1)"
    )
    parser.add_argument(
        "--platform", choices=("cuda", "cpu"), default=None, help="where they will (as found on this machine)"
    )
    parser.add_argument("--gpu-memory-gib", type=float, default=0.0, help="of a GPU (the planner's assumption)")
    own, rest = parser.parse_known_args(list(argv))
    faults: list[Fault] = []
    checks = dict(LIGHT)
    try:
        check_versions()
        checks |= WHOLE
    except MegatronPZError as error:
        faults.append(Fault("versions", f"{error} (What needs them was not examined.)"))
    try:
        config = load_config(rest)
    except MegatronPZError as error:
        faults += [Fault("settings", line) for line in str(error).splitlines()]
    else:
        platform = own.platform or "cpu"
        if not faults:
            from megatron_pz.platform.select import detect_platform, select_platform

            platform = own.platform or detect_platform()
            select_platform("cpu")  # shapes are enough, whatever the run's machine is
        faults += examine(Patient(config, own.world_size, platform, own.gpu_memory_gib), checks)
    for fault in faults:
        sys.stdout.write(f"{fault.thing}: {fault.told}\n")
    sys.stdout.write(f"{len(faults)} fault{'s' if len(faults) > 1 else ''}\n" if faults else "no fault found\n")
    return 2 if faults else 0
