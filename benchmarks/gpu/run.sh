#!/usr/bin/env bash
# GPU benchmarks: run.sh [PART...] [--smoke]      all parts, or some; ends with a table
#   parts: logprobs grpo_loss dense moe weight_sync rollouts curve    a process each; one that fails is told, and the rest go on
#   OUT=DIR          records (runs/gpu-bench)      PYTHON=...  the interpreter, with torch for CUDA and megatron-core
#   MODEL=DIR        Hugging Face folder for weight_sync      SERVER_PYTHON=...  an environment with SGLang
#   CONFIG=FILE      the run that curve makes (examples/demo_smollm2.toml; with --smoke examples/demo.toml)
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
if [[ -z ${PYTHON:-} ]]; then PYTHON=python3; [[ -x $root/.venv/bin/python ]] && PYTHON=$root/.venv/bin/python; fi
OUT=${OUT:-$root/runs/gpu-bench}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
cd "$root" && mkdir -p "$OUT"

# Seconds of each part: 25 minutes in all, which leaves 5 of 30 for `make test-gpu`. What a part found before its end is kept.
declare -A limit=([logprobs]=110 [grpo_loss]=110 [dense]=240 [moe]=240 [weight_sync]=240 [rollouts]=300 [curve]=240)

parts=() smoke=()
for word in "$@"; do if [[ $word == --smoke ]]; then smoke=(--smoke); else parts+=("$word"); fi; done
[[ ${#parts[@]} -gt 0 ]] || parts=(logprobs grpo_loss dense moe weight_sync rollouts curve)
server=(${SERVER_PYTHON:+--server-python "$SERVER_PYTHON"})

records=()
for part in "${parts[@]}"; do
  record=$part
  case $part in
    logprobs|grpo_loss) script=("$part.py") ;;
    dense|moe)   script=(train_step.py --model "$part") record=train_step_$part ;;
    weight_sync) script=(weight_sync.py ${MODEL:+--model "$MODEL"} "${server[@]}") ;;
    # Its smoke run needs a model that a CPU serves.
    rollouts)    script=(rollouts.py "${server[@]}"); [[ ${#smoke[@]} -eq 0 ]] || script+=(${MODEL:+--model "$MODEL"}) ;;
    # It stops its run in good time, so that the same command goes on with it.
    curve)       script=(curve.py --minutes 3.5 ${CONFIG:+--config "$CONFIG"} "${server[@]}") ;;
    *) echo "run.sh: no part $part; there are ${!limit[*]}" >&2; exit 2 ;;
  esac
  records+=("$record")
  rm -f "$OUT/$record.json"
  echo "run.sh: $part, at most ${limit[$part]} s" >&2
  timeout --kill-after 20 "${limit[$part]}" "$PYTHON" "$here/${script[0]}" --out "$OUT" "${smoke[@]}" "${script[@]:1}" >"$OUT/$record.log" 2>&1 ||
    echo "run.sh: $part ended with status $?: $(tail -n 1 "$OUT/$record.log")" >&2
done
exec "$PYTHON" "$here/collect.py" "$OUT" "${records[@]}"
