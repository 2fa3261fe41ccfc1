"""`python -m megatron_pz CONFIG.toml [--field value ...]` trains; see `megatron_pz.train.launch`."""

import sys

from megatron_pz.train.launch import main

if __name__ == "__main__":  # dist_checkpointing spawns a process that imports this module again
    sys.exit(main(sys.argv[1:]))
