# `make setup` does everything; the other targets call it. PYTHON picks the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
READY := $(VENV)/.ready

.PHONY: setup demo bench test test-slow lint format clean help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

setup: $(READY)  ## virtual environment, pinned packages, native kernels

# torch first, alone: where a CPU build lies ready, a resolver that sees all packages at once may pick another.
# The stamp is written last, so that an interrupted set-up starts over.
$(READY): pyproject.toml setup.py constraints.txt $(wildcard csrc/*) $(wildcard csrc/*/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Atomas needs Python 3.11 or newer; run: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY)  ## the main job on a generated corpus: build, train on 2 ranks, evaluate
	$(BIN)/atomas demo

BENCH := OMP_NUM_THREADS=1 $(BIN)/atomas bench
MEASURED := docs/results/kernels_cpu

# In bfloat16 the published form is measured at 8 pairs only: at 32 it takes a quarter of an hour.
bench: $(READY)  ## measure operators and the whole step anew, which takes an hour or more; draw, render the tables
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps maxsim-cpu==0.1.0
	$(BENCH) kernels --shapes paper --mode bwd full --seconds 3 --json $(MEASURED)_float32.json
	$(BENCH) kernels --shapes paper --mode bwd full --seconds 3 --dtype bfloat16 --batch 8 --op token_interaction \
		--providers eager_padded compile_masked reference native --json $(MEASURED)_bfloat16.json
	$(BENCH) kernels --shapes scale --mode bwd full --repeats 1 --memory-limit 11.5 --op token_interaction \
		--providers eager_padded eager_masked reference native --json $(MEASURED)_scale.json
	$(BENCH) step --preset cpu-small --batch 8 --json docs/results/step/cpu-small.json
	$(BENCH) step --preset cpu-small --batch 8 --threads 1 --providers published ours options \
		--json docs/results/step/cpu-small-one-thread.json
	$(BENCH) step --preset cpu-small --batch 8 --dropout 0 --providers published ours \
		--json docs/results/step/cpu-small-no-dropout.json
	$(BENCH) step --preset cpu-small --batch 8 --ranks 1 2 4 --json docs/results/step/cpu-small-ranks.json
	$(BENCH) render docs/results/step/*.json --out docs/results/step
	$(BENCH) render $(MEASURED)_float32.json $(MEASURED)_bfloat16.json $(MEASURED)_scale.json --out docs/results/kernels
	$(BIN)/python -m atomas.viz.tables

test: $(READY)  ## the tests, without the slow ones, in JOBS processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow' -n $(JOBS) --dist worksteal

test-slow: $(READY)  ## the slow tests
	$(BIN)/python -m pytest -m slow

lint: $(READY)  ## ruff and the type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove everything that was built
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find kernels -name '*.so' -delete
