# Set-up is part of every target: the first call makes .venv, later ones start at once.
#   PYTHON    the interpreter to use (3.11 or 3.12)
#   PIP_ARGS  extra arguments for pip, for example to choose a CPU or CUDA build of torch (see README)
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do $$p -c $(SUPPORTED) 2>/dev/null && { echo $$p; break; }; done)
SUPPORTED := 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))'
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# What others are measured with: hivemind needs an older numpy.
PEERS := .venv-peers
PEERS_READY := $(PEERS)/.ready
ARGS ?=

.PHONY: demo reproduce test fuzz soak check bench bench-peers clean help

demo: $(READY) ## two sites codistil on real text, live; ends with a table and a report
	$(BIN)/p2pcodistill simulate simulations/pair.toml $(ARGS)

reproduce: $(READY) ## every claim's scenario, for hours; goes on where it was stopped (ARGS="two_phase" for one)
	$(BIN)/python simulations/reproduce.py $(ARGS)

test: $(READY) ## the whole test suite
	$(BIN)/python -m pytest -n 2 --dist worksteal --ignore tests/integration $(ARGS)
	$(BIN)/python -m pytest -n 2 --dist worksteal tests/integration $(ARGS)

fuzz: $(READY) ## a million mutated frames (ARGS="--num 50000 --seed 7" for others)
	$(BIN)/python tests/fuzz_frames.py $(ARGS)

soak: $(READY) ## all fault scenarios, 100 kill -9 in a ring of four, an hour of exchanges (ARGS="--kills 10 --minutes 5" for others)
	$(BIN)/python tests/soak.py $(ARGS)

check: $(READY) ## format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY) ## the benchmarks, one JSON object a line
	$(BIN)/python -m benchmarks $(ARGS)

bench-peers: $(READY) $(PEERS_READY) ## the benchmark against hivemind, which gets a venv of its own
	$(BIN)/python -m benchmarks exchange_vs_hivemind

clean: ## remove .venv, .venv-peers and caches; runs/ stays
	rm -rf $(VENV) $(PEERS) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build *.egg-info

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/'

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" && $(PYTHON) -c $(SUPPORTED) || \
	  { echo "p2pcodistill needs Python 3.11 or 3.12: install one, or call make PYTHON=/path/to/python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt $(PIP_ARGS) torch
	$(BIN)/pip install --quiet --constraint constraints.txt $(PIP_ARGS) --editable '.[dev]'
	@touch $@

$(PEERS_READY): constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet $(PIP_ARGS) 'hivemind==1.1.12' 'numpy<2.3' "$$(grep '^torch==' constraints.txt)"
	@touch $@
