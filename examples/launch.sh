# Sourced by the scripts of this folder, which are bash and Python at once: starts torchrun on every node, torchrun starts the
# script's Python half. `self` is the script.
#
#   bash SCRIPT | torchrun SCRIPT | torchrun --no-python SCRIPT | srun SCRIPT | sbatch SCRIPT      [--flag value ...]
#
# CONFIG=run.toml another configuration       GPUS_PER_NODE=8   processes a node (all GPUs that are there, else 1)
# DRY_RUN=1 print the command, run nothing    NNODES=1          nodes; without Slurm each needs NODE_RANK and MASTER_ADDR
# PYTHON=python3 interpreter with megatron_pz installed; .venv/bin/python of this repository by default, if it is there

repository=$(cd "$(dirname "$self")/.." && pwd)
if [[ -z ${PYTHON:-} && -x $repository/.venv/bin/python ]]; then PYTHON=$repository/.venv/bin/python; fi
PYTHON=${PYTHON:-python3}
export CONFIG PYTHON NNODES=${NNODES:-${SLURM_NNODES:-1}}
count_gpus() { command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus 2>/dev/null | wc -l || echo 0; }
if [[ -z ${GPUS_PER_NODE:-} ]]; then
    GPUS_PER_NODE=${SLURM_GPUS_ON_NODE:-$(count_gpus)}
    ((GPUS_PER_NODE > 0)) || GPUS_PER_NODE=1
fi

run() {
    if [[ ${DRY_RUN:-0} == 1 ]]; then
        printf 'CONFIG=%q NNODES=%q' "${CONFIG:-}" "$NNODES"
        printf ' %q' "$@"
        printf '\n'
        exit 0
    fi
    exec "$@"
}

torchrun=("$PYTHON" -m torch.distributed.run --nproc-per-node "$GPUS_PER_NODE")
if [[ -n ${TORCHELASTIC_RUN_ID:-} ]]; then # torchrun --no-python: a worker already
    run "$PYTHON" "$self" "$@"
elif [[ -n ${SLURM_JOB_ID:-} && -z ${SLURM_STEP_ID:-} ]]; then # the batch shell: one launcher a node
    run srun --nodes "$NNODES" --ntasks "$NNODES" --ntasks-per-node 1 --kill-on-bad-exit=1 bash "$self" "$@"
elif [[ -n ${SLURM_JOB_ID:-} ]]; then # a task of srun, one a node
    master=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
    run "${torchrun[@]}" --nnodes "$NNODES" --node-rank "$SLURM_NODEID" --master-addr "$master" \
        --master-port "${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}" "$self" "$@"
elif ((NNODES > 1)); then
    : "${NODE_RANK:?NNODES=$NNODES without Slurm: set NODE_RANK to the number of this node, 0 to $((NNODES - 1))}"
    : "${MASTER_ADDR:?NNODES=$NNODES without Slurm: set MASTER_ADDR to the address of node 0}"
    run "${torchrun[@]}" --nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" \
        --master-port "${MASTER_PORT:-29500}" "$self" "$@"
else
    run "${torchrun[@]}" --standalone "$self" "$@"
fi
