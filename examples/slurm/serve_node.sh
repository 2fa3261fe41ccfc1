#!/bin/bash
# The task of a server node in disaggregated.sbatch: its servers, until they are told to end. What tools/serve.py prints when they
# answer goes into a file that the batch shell waits for.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/slurm.sh"
trap '' USR1 # the time limit is the trainer's business; it ends these
exec "$PYTHON" "$repository/tools/serve.py" "$CONFIG" "$@" --run-dir "$RUN_DIR/servers/node-$SLURM_NODEID" \
    --api-key-file "$RUN_DIR/server.key" --server-host "${SERVER_HOST:-$(own_address)}" >"$RUN_DIR/servers/ready-$SLURM_NODEID"
