"""`python -m megatron_pz.report RUN_DIR` writes report.html; `--list-metrics` prints the table of all metrics."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_pz.errors import MegatronPZError
from megatron_pz.report.page import MAX_ROLLOUT_BYTES, write_page
from megatron_pz.report.reference import markdown


def main(argv: Sequence[str]) -> int:
    """Write the page, or the list of metrics; 1 after an error that a user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_pz.report", description="Write one self-contained HTML page about a run."
    )
    parser.add_argument("run_dir", nargs="?", type=Path, metavar="RUN_DIR", help="as in checkpoint.run_dir")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: RUN_DIR/report.html")
    parser.add_argument(
        "--rollout-megabytes",
        type=float,
        default=MAX_ROLLOUT_BYTES / 1e6,
        metavar="N",
        help="rollouts to put into the page; evenly chosen steps if there are more (default %(default)g)",
    )
    parser.add_argument("--list-metrics", action="store_true", help="print docs/metrics.md instead")
    options = parser.parse_args(argv)
    if options.list_metrics:
        sys.stdout.write(markdown())
        return 0
    if options.run_dir is None:
        parser.error("RUN_DIR is missing")
    try:
        path = write_page(options.run_dir, options.out, round(options.rollout_megabytes * 1e6))
    except MegatronPZError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{path}: {path.stat().st_size / 1e6:.1f} MB\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
