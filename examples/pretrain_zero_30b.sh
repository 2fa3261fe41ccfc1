#!/bin/bash
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@600
''':' # Qwen3-30B-A3B on NNODES=1, 2, 4 or 8 nodes. Ways to start it and variables: launch.sh. Bash reads to the end, Python only its own half.
set -euo pipefail
self=${BASH_SOURCE[0]}
if [[ $self == */slurm_script ]]; then # the copy that Slurm runs
    self=$(scontrol show job "$SLURM_JOB_ID" | grep -o 'Command=[^ ]*' | head -n 1 | cut -d= -f2)
fi
self=$(realpath "$self")
source "$(dirname "$self")/launch.sh"
: <<'# end of the Python half'
'''
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    nodes = int(os.environ.get("WORLD_SIZE", 1)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    config = os.environ.get("CONFIG") or str(Path(__file__).parent / f"pretrain_zero_30b_{nodes}node.toml")
    if os.environ.get("DRY_RUN") == "1":  # torchrun has started ranks already: they end here
        if os.environ.get("RANK", "0") == "0":
            print(f"{os.environ.get('WORLD_SIZE', 1)} ranks: -m megatron_pz", config, *sys.argv[1:])
        sys.exit(0)
    from megatron_pz.train.launch import main

    sys.exit(main([config, *sys.argv[1:]]))
# end of the Python half
