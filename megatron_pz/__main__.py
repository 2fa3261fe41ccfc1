"""`python -m megatron_pz CONFIG.toml [--field value ...]` trains; see `megatron_pz.train.launch`."""

import sys

from megatron_pz.platform.children import follow_parent

# Megatron has multiprocessing spawn a process for a checkpoint. It imports this module again, by its file, which it does not
# where the module has a name that ends in __main__; and nothing heavier.
__spec__ = None
follow_parent(__name__)

if __name__ == "__main__":
    from megatron_pz.train.launch import main

    sys.exit(main(sys.argv[1:]))
