# make demo          PretrainZero on real text with a small real policy; STEPS=200 goes on to step 200
#                    ENGINE=sglang has a real SGLang server generate, in runs/demo_sglang
# make demo-smollm2  the same with SmolLM2-135M-Instruct
# make test          lint, types, layers, tests        make test-slow  the long ones
# make test-gpu      the GPU tests, on a machine with one; GPU_PYTHON=python3 where it has torch already
# make test-engine   the real Transformer Engine on a CPU, its compiled functions in plain torch; it is compiled first (a quarter of an hour)
# make test-latest   the same tests with the newest megatron-core, on Python 3.12, in .venv-latest
# make clean         removes .venv, .venv-latest, .venv-engine, .venv-sglang and caches, keeps runs/
# PYTHON=python3.12 chooses the interpreter of a new .venv (3.11, else 3.12, by default).

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory
export PYTHON

STEPS ?=
# Test processes side by side; each computes with one thread.
WORKERS ?= 2
PY := .venv/bin/python
GPU_PYTHON ?= $(PY)
LATEST := .venv-latest
OVERRIDES := $(if $(STEPS),--train-iters $(STEPS))
ENGINE ?= embedded
SGLANG := $(filter sglang,$(ENGINE))

.PHONY: demo demo-smollm2 demo-corpus smollm2 test test-slow test-latest test-engine test-gpu lint server bench-env clean help

help:
	@sed -n 's/^# //p' Makefile | head -n 9

demo: demo-corpus $(if $(SGLANG),server)
	@$(PY) -m megatron_pz examples/demo.toml --engine $(ENGINE) $(if $(SGLANG),--run-dir runs/demo_sglang) $(OVERRIDES)

demo-smollm2: demo-corpus smollm2
	@$(PY) -m megatron_pz examples/demo_smollm2.toml $(OVERRIDES)

demo-corpus:
	@tools/setup_env.sh run
	@$(PY) tools/fetch_demo_corpus.py .cache/demo

smollm2:
	@tools/setup_env.sh smollm2
	@$(PY) tools/make_smollm2.py .cache/smollm2-135m-instruct

QUICK := -m pytest -q -m "not slow" -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: lint server
	@PZ_NEEDS_SERVER=1 $(PY) $(QUICK)

test-latest: server
	@PZ_VENV=$(LATEST) PYTHON=$${PYTHON:-python3.12} tools/setup_env.sh test
	@PZ_NEEDS_SERVER=1 $(LATEST)/bin/python $(QUICK)

test-engine:
	@tools/setup_engine.sh
	@.venv-engine/bin/python -m pytest -q -rs tests/models/test_transformer_engine_*.py

# One process: a device is shared, and a process has one platform.
test-gpu:
	@PZ_NEEDS_GPU=1 $(GPU_PYTHON) -m pytest -q -rs -m gpu tests/gpu tests/sync/test_handles.py

test-slow: smollm2
	@tools/setup_env.sh test
	@$(PY) tools/fetch_demo_corpus.py .cache/demo
	@$(PY) -m pytest -v -rP -m slow -n $(WORKERS)

lint:
	@tools/setup_env.sh test
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check --quiet . || { echo 'lint: formatting differs; run .venv/bin/ruff format .' >&2; exit 1; }
	@.venv/bin/mypy
	@.venv/bin/lint-imports --no-cache > .cache/layers.log || { cat .cache/layers.log; exit 1; }
	@echo 'lint: layers kept'

# An SGLang server's environment, for a CPU.
server:
	@tools/setup_env.sh server

bench-env:
	@tools/setup_env.sh bench

clean:
	@rm -rf .venv $(LATEST) .venv-engine .venv-sglang .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo 'clean: runs/ is kept'
