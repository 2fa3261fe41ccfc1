"""What is in a checkpoint of a run, or in a converted one; with --verify, whether every file is as it was written.

    python tools/inspect_checkpoint.py runs/demo/checkpoints/step_000040 [--verify] [--no-tensors] [--json]

Exit status: 0 it is whole (without --verify: its files are all there), 1 it is damaged, 2 it is no checkpoint of ours.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from megatron_pz.errors import MegatronPZError
from megatron_pz.platform.select import select_platform


def main(argv: Sequence[str]) -> int:
    """See the module."""
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DIR", type=Path, help="a step_NNNNNN folder, or a converted checkpoint")
    parser.add_argument("--verify", action="store_true", help="read every file and compare its SHA-256")
    parser.add_argument("--threads", type=int, default=min(8, os.cpu_count() or 1), help="files verified at a time")
    parser.add_argument("--no-tensors", action="store_true", help="leave out the list of tensors")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(list(argv))
    select_platform("cpu")  # before Megatron is imported
    from megatron_pz.checkpoint.overview import extra_files, lines, overview, verify

    try:
        found = overview(given.folder)
    except MegatronPZError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 2
    if given.verify:
        columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("verify", total=found.num_bytes)
            faults = verify(found, threads=max(1, given.threads), advance=lambda count: progress.advance(task, count))
    else:
        faults = found.visible_damage
    extra = extra_files(found)
    if given.json:
        tensors = [dataclasses.asdict(tensor) for tensor in found.tensors]
        told = {**found.manifest, "tensors": tensors, "verified": given.verify, "damage": faults, "extra": extra}
        sys.stdout.write(json.dumps(told) + "\n")
        return 1 if faults else 0
    sys.stdout.write("".join(f"{line}\n" for line in lines(found, with_tensors=not given.no_tensors)))
    sys.stdout.write("".join(f"extra: {name} is not in the manifest\n" for name in extra))
    sys.stderr.write("".join(f"damaged: {fault}\n" for fault in faults))
    if not faults:
        done = "verified: every file is as it was written" if given.verify else "every file is there (not verified)"
        sys.stdout.write(f"{done}\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
