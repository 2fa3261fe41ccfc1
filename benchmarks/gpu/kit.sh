#!/usr/bin/env bash
# What a GPU machine without a registry needs, as pieces that travel beside the working tree: benchmarks/gpu/kit.sh [DIR]
# Wheels for that machine's Python (TARGET_PYTHON, 3.12) land in DIR (.cache/gpu-kit), in folders of less than 64 MiB each. It has
# torch, Triton and transformers of its own. Transformer Engine and SGLang are larger than the pieces and stay out; tests and
# benchmarks that want them say so. `benchmarks/gpu/kit.sh --install DIR` on the other machine installs what DIR holds, offline.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
LIMIT=$((60 * 1024 * 1024))
PACKAGES=(megatron-core==0.16.1 psutil packaging safetensors sentencepiece math-verify liger-kernel==0.8.5
          pytest pytest-asyncio pytest-xdist pytest-timeout hypothesis tensorboard)

if [[ ${1:-} == --install ]]; then
  dir=${2:-$root/.cache/gpu-kit}
  python3 -m pip install --quiet --no-index --no-deps "$dir"/*/*.whl
  exec python3 -c 'import megatron.core, torch; print("kit: megatron-core", megatron.core.__version__, "torch", torch.__version__)'
fi

dir=${1:-$root/.cache/gpu-kit}
python=${PYTHON:-$root/.venv/bin/python}
partial=$dir.tmp
rm -rf "$partial" && mkdir -p "$partial/all"
"$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "${TARGET_PYTHON:-3.12}" \
  --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 --platform linux_x86_64 --platform any \
  --dest "$partial/all" "${PACKAGES[@]}" aiohttp iniconfig pluggy sortedcontainers execnet latex2sympy2-extended antlr4-python3-runtime==4.13.2

piece=0 held=0
for wheel in "$partial"/all/*.whl; do
  size=$(stat -c %s "$wheel")
  if ((size > LIMIT)); then echo "kit: $(basename "$wheel") has $size bytes, more than a piece" >&2; exit 1; fi
  if ((piece == 0 || held + size > LIMIT)); then piece=$((piece + 1)) held=0; mkdir -p "$partial/piece-$piece"; fi
  mv "$wheel" "$partial/piece-$piece/" && held=$((held + size))
done
rmdir "$partial/all" && rm -rf "$dir" && mv "$partial" "$dir"
du -sm "$dir"/piece-* | awk '{print "kit: " $2 ", " $1 " MiB"}'
