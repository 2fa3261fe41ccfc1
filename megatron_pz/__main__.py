"""`python -m megatron_pz CONFIG.toml [--field value ...]` trains; see `megatron_pz.train.launch`."""

import sys

from megatron_pz.train.launch import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
