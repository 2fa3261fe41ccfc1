#!/usr/bin/env bash
# Makes .venv-engine: the real Transformer Engine beside torch for CUDA and megatron-core, with or without a GPU, for `make test-engine`.
# What of Transformer Engine is a source package, its binding to torch, is compiled here against CUDA's headers from pip (9 minutes on
# two cores). The wheels stay in .cache/engine-wheels, from where benchmarks/gpu/kit.sh takes them to a machine of the same Python and torch.
# PYTHON=... another interpreter than python3.12; ENGINE, TORCH: other versions.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ENGINE=${ENGINE:-2.11.0}  # the newest that megatron-core 0.16.1 names
TORCH=${TORCH:-2.11.0}    # as on the GPU machine of benchmarks/gpu/README.md
MEGATRON=0.16.1
CUDA_HEADERS=(nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-cccl==13.0.85 nvidia-cuda-profiler-api)
venv=.venv-engine wheels=$PWD/.cache/engine-wheels log=.cache/setup-engine.log
stamp=$venv/.installed
wanted="$ENGINE $TORCH $MEGATRON $(cksum <setup.py)"
[[ -f $stamp && $(<"$stamp") == "$wanted" ]] && exit 0

die() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }
say() { printf 'setup: %s\n' "$*"; }
pip() {
  "$venv/bin/python" -m pip "$1" --disable-pip-version-check --no-input --progress-bar off "${@:2}" >>"$log" 2>&1 ||
    { grep -v '^WARNING' "$log" | tail -n 8 >&2 || true; die "pip $1 failed; all of its words are in $log."; }
}

mkdir -p .cache "$wheels" && : >"$log"
if [[ ! -x $venv/bin/python ]]; then
  free_mib=$(df -Pk . | awk 'NR == 2 { print int($4 / 1024) }')
  ((free_mib >= 9000)) || die "$free_mib MiB are free here; about 9000 are needed. Free some room, or clone to another disk."
  python=${PYTHON:-python3.12}
  command -v "$python" >/dev/null || die "no $python; name an interpreter of Python 3.12: make PYTHON=/path/to/python3.12 test-engine"
  "$python" -m venv "$venv" >"$log" 2>&1 || die "python -m venv failed; its words are in $log."
fi
# The binding is one torch's and one Python's.
built="$ENGINE $TORCH $("$venv/bin/python" -V)"
if [[ -f $wheels/built && $(<"$wheels/built") != "$built" ]]; then rm -f "$wheels"/*.whl; fi
printf '%s\n' "$built" >"$wheels/built"
say "torch $TORCH for CUDA, megatron-core $MEGATRON ..."
# Triton's interpreter in torch 2.11 takes no newer numpy.
pip install "torch==$TORCH" "megatron-core==$MEGATRON" "numpy<2.4" wheel ninja pybind11 "${CUDA_HEADERS[@]}"
pip install --no-build-isolation --editable ".[dev]" "torch==$TORCH" "megatron-core==$MEGATRON" "numpy<2.4"
say "Transformer Engine $ENGINE ..."
pip download --no-deps --dest "$wheels" "transformer-engine==$ENGINE" "transformer-engine-cu13==$ENGINE"
pip install --find-links "$wheels" "transformer-engine==$ENGINE" "transformer-engine-cu13==$ENGINE" einops onnx onnxscript
if ! compgen -G "$wheels/transformer_engine_torch-$ENGINE-*.whl" >/dev/null; then
  say "its binding to torch is compiled (9 minutes on two cores) ..."
  headers=$(echo "$PWD/$venv"/lib/python*/site-packages/nvidia)
  CUDA_HOME=$headers/cu13 CPATH=$headers/cu13/include:$headers/cudnn/include:$headers/nccl/include PATH=$PWD/$venv/bin:$PATH \
    NVTE_PYTORCH_FORCE_BUILD=TRUE MAX_JOBS=${MAX_JOBS:-2} \
    pip wheel --no-deps --no-build-isolation --no-binary transformer-engine-torch --wheel-dir "$wheels" "transformer-engine-torch==$ENGINE"
fi
pip install --no-deps --find-links "$wheels" "transformer-engine-torch==$ENGINE"
"$venv/bin/python" -c 'import torch, transformer_engine.pytorch' >>"$log" 2>&1 || die "Transformer Engine cannot be imported; Python's words are in $log."
printf '%s\n' "$wanted" >"$stamp"
say "Transformer Engine $ENGINE is in $venv, its wheels in $wheels"
