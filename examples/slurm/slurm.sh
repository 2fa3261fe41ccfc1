# Sourced by the batch scripts of this folder, and by ../launch.sh under Slurm. docs/slurm.md tells what happens when.
#
# CONFIG, GPUS_PER_NODE, MAX_RESTARTS, PYTHON, DRY_RUN   see ../launch.sh
# NNODES=2         nodes that train, of those that the job has (all)
# SRUN_ARGS=...    further arguments of every srun; in a container by pyxis:
#                  SRUN_ARGS="--container-image=/shared/image.sqsh --container-mounts=/shared:/shared"
# CONTAINER=...    what every command begins with; in a container by apptainer:
#                  CONTAINER="apptainer exec --nv --bind /shared /shared/image.sif"

examples=${examples:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
repository=$(dirname "$examples")
if [[ -z ${PYTHON:-} && -x $repository/.venv/bin/python ]]; then PYTHON=$repository/.venv/bin/python; fi
export PYTHON=${PYTHON:-python3} CONFIG=${CONFIG:-}

say() { printf '%s job %s, start %s: %s\n' "$(date +%T)" "${SLURM_JOB_ID:-none}" "${SLURM_RESTART_COUNT:-0}" "$*"; }

# Addresses by node, for in a container there is no Slurm to ask: "n1=10.0.0.1 n2=10.0.0.2".
find_addresses() { # nodes, one a word
    local node found=""
    for node; do
        found+="$node=$(scontrol show node "$node" 2>/dev/null | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2) "
    done
    printf '%s' "$found"
}
own_address() { grep -oP "(^| )${SLURMD_NODENAME:-$(hostname)}=\K[^ ]*" <<<"${NODE_ADDRESSES:-}" || hostname; }
first_address() { grep -oP '^[^=]*=\K[^ ]+' <<<"${NODE_ADDRESSES:-}" || scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1; }

nodes=()
find_nodes() { # the list of a job or step
    read -ra nodes <<<"$(scontrol show hostnames "$1" 2>/dev/null | tr '\n' ' ')"
    while ((${#nodes[@]} < ${NNODES:-1})) && [[ ${DRY_RUN:-0} == 1 ]]; do nodes+=("node${#nodes[@]}"); done
    NODE_ADDRESSES=$(find_addresses "${nodes[@]}")
    export NODE_ADDRESSES
}

# Starts a job step of one task a node; $step is the process of its srun.
step=""
start_step() { # first of the job's nodes, number of nodes, command ...
    local names command
    printf -v names '%s,' "${nodes[@]:$1:$2}"
    # shellcheck disable=SC2206 # variables of several words
    command=(srun --nodes "$2" --ntasks "$2" --ntasks-per-node 1 --nodelist "${names%,}" --kill-on-bad-exit=1
        ${SRUN_ARGS:-} ${CONTAINER:-} "${@:3}")
    if [[ ${DRY_RUN:-0} == 1 ]]; then
        printf 'CONFIG=%q NNODES=%q' "$CONFIG" "$2"
        printf ' %q' "${command[@]}"
        printf '\n'
        return
    fi
    NNODES=$2 "${command[@]}" &
    step=$!
}

# Returns as soon as one of the processes has ended. Bash runs its traps between two naps, which are no processes: those a signal
# to the whole job would end.
exec {silent}<> <(:)
nap() { read -r -t "$1" -u "$silent" || true; }
await_end_of() { # process ids
    local process
    while :; do
        for process; do
            kill -0 "$process" 2>/dev/null || return 0
        done
        nap 1
    done
}

# Slurm sends USR1 to the batch shell before the time limit (--signal=B:USR1@SECONDS). It is passed on until it is heard: a trainer
# that is still loading has no ear for it yet.
is_stopping=0
stop_at_time_limit() { # process of an srun, signal that it is told by
    # shellcheck disable=SC2064 # expanded now
    trap "is_stopping=1; say 'the time limit is near: $2 to the step'
        (while kill -$2 $1 2>/dev/null; do nap 10; done) &" USR1
    if ((is_stopping)); then kill -USR1 $$; fi # told while the doctor was at work
    trap 'say "asked to end"' TERM # Slurm has told the steps too; they end first
}

# Where the step failed because a machine is gone, srun may see it long before Slurm does, and the job would count as failed.
nodes_answer() {
    timeout 120 srun --overlap --nodes "${#nodes[@]}" --ntasks "${#nodes[@]}" --ntasks-per-node 1 true >/dev/null 2>&1
}

finish() { # exit status
    local why=""
    if [[ $1 == 0 ]]; then
        ((!is_stopping)) || why="saved before the time limit"
    else
        say "the step has ended with status $1"
        nodes_answer || why="a node does not answer"
    fi
    if [[ -n $why ]]; then
        say "$why: queued again"
        scontrol requeue "$SLURM_JOB_ID" || say "it cannot be queued again: submit it again, and it goes on from here"
    fi
    exit "$1"
}

# Tells every fault of the run, and ends the job, before a model is loaded (python -m megatron_pz doctor). Find the nodes first.
examine() { # number of nodes that train, flags of the run
    local ranks=$(($1 * ${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}))
    [[ ${DRY_RUN:-0} != 1 ]] || return 0
    trap 'is_stopping=1' USR1
    # shellcheck disable=SC2086 # variables of several words
    srun --nodes 1 --ntasks 1 --ntasks-per-node 1 ${SRUN_ARGS:-} ${CONTAINER:-} \
        "$PYTHON" -m megatron_pz doctor "$CONFIG" --world-size "$ranks" "${@:2}" || finish $?
}

# Trains on the first NNODES nodes of the job, until the run is done or the time limit is near.
train() { # command of a node's task
    find_nodes "${SLURM_JOB_NODELIST:-}"
    start_step 0 "${NNODES:-${#nodes[@]}}" "$@"
    [[ ${DRY_RUN:-0} != 1 ]] || exit 0
    stop_at_time_limit "$step" USR1
    await_end_of "$step"
    wait "$step" && finish 0 || finish $?
}

# Runs a tool that goes on where it was when it is called again, on one node.
run_tool() { # command
    local status
    find_nodes "${SLURM_JOB_NODELIST:-}"
    start_step 0 1 "$@"
    [[ ${DRY_RUN:-0} != 1 ]] || exit 0
    stop_at_time_limit "$step" TERM
    await_end_of "$step"
    wait "$step" && status=0 || status=$?
    if ((status == 0)); then is_stopping=0; elif ((is_stopping)); then status=0; fi # stopped: what it had done is kept
    finish "$status"
}
