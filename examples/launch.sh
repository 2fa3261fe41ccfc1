# Starts torchrun on every node. The scripts of this folder, which are bash and Python at once, source it (`self` is the script
# and torchrun starts its Python half); `CONFIG=run.toml bash launch.sh` starts the program itself.
#
#   bash SCRIPT | torchrun SCRIPT | torchrun --no-python SCRIPT | srun SCRIPT | sbatch SCRIPT      [--flag value ...]
#
# CONFIG=run.toml another configuration       GPUS_PER_NODE=8   processes a node (all GPUs that are there, else 1)
# DRY_RUN=1 print the command, train nothing  NNODES=1          nodes; without Slurm each needs NODE_RANK and MASTER_ADDR
# MAX_RESTARTS=3 times that ranks are started again where one dies: they go on from the newest checkpoint
# PYTHON=python3 interpreter with megatron_pz installed; .venv/bin/python of this repository by default, if it is there
# Under Slurm also: slurm/slurm.sh

examples=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ -z ${PYTHON:-} && -x $examples/../.venv/bin/python ]]; then PYTHON=$(dirname "$examples")/.venv/bin/python; fi
PYTHON=${PYTHON:-python3}
export CONFIG PYTHON NNODES=${NNODES:-${SLURM_NNODES:-1}}
count_gpus() { command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus 2>/dev/null | wc -l || echo 0; }
if [[ -z ${GPUS_PER_NODE:-} ]]; then
    GPUS_PER_NODE=${SLURM_GPUS_ON_NODE:-$(count_gpus)}
    ((GPUS_PER_NODE > 0)) || GPUS_PER_NODE=1
fi

if [[ -n ${self:-} ]]; then
    program=("$self")
    again=(bash "$self")
else
    set -euo pipefail
    program=(-m megatron_pz "${CONFIG:?CONFIG=run.toml is not set}")
    again=(bash "$examples/launch.sh")
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

# torchrun answers USR1 by dying without its workers. Here it is deaf to it, and USR1 or TERM for this shell tells the workers to save
# the step that they are in. Slurm may signal this shell's process group or, by its cgroup, all processes: both end so.
run_told() {
    [[ ${DRY_RUN:-0} != 1 ]] || run "$@"
    set -m
    # Deaf are the workers too, until they have their own handler.
    (trap '' USR1 && exec "$@") </dev/null &
    launcher=$!
    # shellcheck disable=SC2046 # process ids, one a word
    trap 'kill -USR1 $(cat /proc/"$launcher"/task/*/children) 2>/dev/null || true' USR1 TERM
    while kill -0 "$launcher" 2>/dev/null; do wait "$launcher" || true; done # a signal ends a wait
    wait "$launcher" && exit 0 || exit $?
}

# One launcher a node, which find each other at `host`:`port` and agree on a restart. torch would reuse the store of the first start,
# in which the addresses of dead ranks stand.
run_on_nodes() { # number of this node, its address, host, port, then the program's flags
    local node=$1 address=$2 host=$3 port=$4
    shift 4
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    run_told "${torchrun[@]}" --nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "$host:$port" \
        --rdzv-id "${SLURM_JOB_ID:-0}.${SLURM_RESTART_COUNT:-0}" --rdzv-conf "is_host=$((node == 0))" \
        ${address:+--local-addr "$address"} "${program[@]}" "$@"
}

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600} # to save after a TERM or Ctrl-C; else 30 s
torchrun=("$PYTHON" -m torch.distributed.run --nproc-per-node "$GPUS_PER_NODE" --max-restarts "${MAX_RESTARTS:-3}")
if [[ -n ${TORCHELASTIC_RUN_ID:-} ]]; then # torchrun --no-python: a worker already
    run "$PYTHON" "${program[@]}" "$@"
elif [[ -n ${SLURM_JOB_ID:-} && -z ${SLURM_STEP_ID:-} ]]; then # the batch shell: one launcher a node
    source "$examples/slurm/slurm.sh"
    train "${again[@]}" "$@"
elif [[ -n ${SLURM_JOB_ID:-} ]]; then # a task of srun, one a node
    source "$examples/slurm/slurm.sh"
    [[ -n ${NODE_ADDRESSES:-} ]] || find_nodes "$SLURM_STEP_NODELIST" # srun by hand, without a batch shell
    run_on_nodes "$SLURM_NODEID" "$(own_address)" "${MASTER_ADDR:-$(first_address)}" \
        "${MASTER_PORT:-$((20000 + (SLURM_JOB_ID * 8 + ${SLURM_RESTART_COUNT:-0}) % 10000))}" "$@"
elif ((NNODES > 1)); then
    : "${NODE_RANK:?NNODES=$NNODES without Slurm: set NODE_RANK to the number of this node, 0 to $((NNODES - 1))}"
    : "${MASTER_ADDR:?NNODES=$NNODES without Slurm: set MASTER_ADDR to the address of node 0}"
    run_on_nodes "$NODE_RANK" "${NODE_ADDR:-}" "$MASTER_ADDR" "${MASTER_PORT:-29500}" "$@"
else
    run "${torchrun[@]}" --standalone "${program[@]}" "$@"
fi
