#!/usr/bin/env bash
# GPU benchmarks: run.sh [PART...] [--smoke] [--dry-run]      all parts, or some; ends with a table
#   parts: logprobs grpo_loss dense moe weight_sync rollouts curve curve_precision
#                    a process each; one that fails is told, and the rest go on
#   --smoke          tiny shapes, on a CPU too             --dry-run  the commands and their limits, nothing else
#   OUT=DIR          records (runs/gpu-bench)              PYTHON=... the interpreter, with torch for CUDA and megatron-core
#   MODEL=DIR        Hugging Face folder for weight_sync   SERVER_PYTHON=...  an environment with SGLang
#   CONFIG=FILE      the run that curve makes (examples/demo_smollm2.toml; with --smoke examples/demo.toml)
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
if [[ -z ${PYTHON:-} ]]; then PYTHON=python3; [[ -x $root/.venv/bin/python ]] && PYTHON=$root/.venv/bin/python; fi
OUT=${OUT:-$root/runs/gpu-bench}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
cd "$root"

# Seconds of each part: 24 minutes in all, which leaves 6 of 30 for the machine's start and `make test-gpu`. What a part found
# before its end is kept.
declare -A limit=([logprobs]=90 [grpo_loss]=90 [dense]=210 [moe]=210 [weight_sync]=210 [rollouts]=270 [curve]=210
                  [curve_precision]=170)

parts=() smoke=() dry=
for word in "$@"; do
  case $word in
    --smoke)     smoke=(--smoke) ;;
    --dry-run)   dry=1 ;;
    -h|--help)   sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit ;;
    -*)          echo "run.sh: no option $word; see run.sh --help" >&2; exit 2 ;;
    *)           [[ -v limit[$word] ]] || { echo "run.sh: no part $word; there are ${!limit[*]}" >&2; exit 2; }
                 parts+=("$word") ;;
  esac
done
[[ ${#parts[@]} -gt 0 ]] || parts=(logprobs grpo_loss dense moe weight_sync rollouts curve curve_precision)
[[ -n $dry ]] || mkdir -p "$OUT"
if [[ ${#smoke[@]} -gt 0 ]]; then for part in "${!limit[@]}"; do limit[$part]=1200; done; fi  # servers start slowly on a CPU
server=(${SERVER_PYTHON:+--server-python "$SERVER_PYTHON"})

records=()
for part in "${parts[@]}"; do
  record=$part
  case $part in
    logprobs|grpo_loss) script=("$part.py") ;;
    dense|moe)   script=(train_step.py --model "$part") record=train_step_$part ;;
    weight_sync) script=(weight_sync.py ${MODEL:+--model "$MODEL"} "${server[@]}") ;;
    # Its smoke run needs a model that a CPU serves.
    rollouts)    script=(rollouts.py --seconds 60 "${server[@]}"); [[ ${#smoke[@]} -eq 0 ]] || script+=(${MODEL:+--model "$MODEL"}) ;;
    # They stop their run in good time, so that the same command goes on with it.
    curve)       script=(curve.py --minutes 3 ${CONFIG:+--config "$CONFIG"} "${server[@]}") ;;
    curve_precision) script=(curve.py --study precision --minutes 2.3 "${server[@]}") ;;
  esac
  command=("$PYTHON" "$here/${script[0]}" --out "$OUT" "${smoke[@]}" "${script[@]:1}")
  if [[ -n $dry ]]; then printf '%4d s  %s\n' "${limit[$part]}" "${command[*]}"; continue; fi
  records+=("$record")
  rm -f "$OUT/$record.json"
  echo "run.sh: $part, at most ${limit[$part]} s" >&2
  timeout --kill-after 20 "${limit[$part]}" "${command[@]}" >"$OUT/$record.log" 2>&1 ||
    echo "run.sh: $part ended with status $?: $(tail -n 1 "$OUT/$record.log")" >&2
done
[[ -z $dry ]] || exit 0
exec "$PYTHON" "$here/collect.py" "$OUT" "${records[@]}"
