#!/usr/bin/env bash
# GPU benchmarks: run.sh [PART...] [--smoke]      all parts, or some; ends with a table
#   parts: logprobs dense moe weight_sync curve    each under 10 minutes, a process of its own; one that fails is told, and the rest go on
#   OUT=DIR          records (runs/gpu-bench)      PYTHON=...  the interpreter, with torch for CUDA and megatron-core
#   MODEL=DIR        Hugging Face folder for weight_sync      SERVER_PYTHON=...  an environment with SGLang
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
if [[ -z ${PYTHON:-} ]]; then PYTHON=python3; [[ -x $root/.venv/bin/python ]] && PYTHON=$root/.venv/bin/python; fi
OUT=${OUT:-$root/runs/gpu-bench}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
cd "$root" && mkdir -p "$OUT"

parts=() smoke=()
for word in "$@"; do if [[ $word == --smoke ]]; then smoke=(--smoke); else parts+=("$word"); fi; done
[[ ${#parts[@]} -gt 0 ]] || parts=(logprobs dense moe weight_sync curve)

records=()
for part in "${parts[@]}"; do
  case $part in
    logprobs)    script=(logprobs.py) record=logprobs ;;
    dense|moe)   script=(train_step.py --model "$part") record=train_step_$part ;;
    weight_sync) script=(weight_sync.py ${MODEL:+--model "$MODEL"} ${SERVER_PYTHON:+--server-python "$SERVER_PYTHON"}) record=weight_sync ;;
    curve)       script=(curve.py ${SERVER_PYTHON:+--server-python "$SERVER_PYTHON"}) record=curve ;;
    *) echo "run.sh: no part $part; there are logprobs dense moe weight_sync curve" >&2; exit 2 ;;
  esac
  records+=("$record")
  rm -f "$OUT/$record.json"
  echo "run.sh: $part" >&2
  timeout 580 "$PYTHON" "$here/${script[0]}" --out "$OUT" "${smoke[@]}" "${script[@]:1}" >"$OUT/$record.log" 2>&1 ||
    echo "run.sh: $part failed: $(tail -n 1 "$OUT/$record.log")" >&2
done
exec "$PYTHON" "$here/collect.py" "$OUT" "${records[@]}"
