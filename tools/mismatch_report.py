"""Where the gap between the engine's log-probs and the trainer's comes from: one table, the largest cause first.

    [torchrun --nproc-per-node N] tools/mismatch_report.py RUN_DIR [--steps STEP[-STEP]] [--max-tokens N] [--flag value ...]

    --steps        rounds to score; else the newest two that can be. A round takes RUN_DIR/journal/step_N.jsonl, which runs
                   with servers write, and the checkpoint of the step before (step 1: the model the run began with)
    --max-tokens   tokens of each round that are scored, prompts included (20000)

Settings are those of RUN_DIR/config.toml, over which flags of a run may be given, e.g. of another layout. What cannot be told
apart stands in megatron_pz/train/mismatch.py. Exits with 0, or with 2 if nothing can be scored.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_pz.config.load import load_config
from megatron_pz.config.rules import validate
from megatron_pz.errors import MegatronPZError
from megatron_pz.platform.select import select_platform


def main(argv: Sequence[str]) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--steps", type=_steps, default=())
    parser.add_argument("--max-tokens", type=int, default=20000)
    given, flags = parser.parse_known_args(list(argv))
    try:
        config = load_config([str(given.run_dir / "config.toml"), *flags])
        validate(config, int(os.environ.get("WORLD_SIZE", "1")))
        select_platform()  # before Megatron is imported
        from megatron_pz.train.mismatch import mismatch_budget

        budget = mismatch_budget(config, given.run_dir, given.steps, max_tokens=given.max_tokens)
    except MegatronPZError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 2
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.write("".join(f"{line}\n" for line in budget.told()))
    return 0


def _steps(text: str) -> tuple[int, ...]:
    """`7` or `7-9`, the last included."""
    first, _, last = text.partition("-")
    return tuple(range(int(first), int(last or first) + 1))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
