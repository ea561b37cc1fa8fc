# Two commands on a fresh machine: `make demo` and `make test`. Each makes its own virtual environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: demo test test-all lint compiled types docs clean

$(VENV)/ready-%: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "lfm needs Python 3.11 or newer; this is $$($(PYTHON) --version). Try: make PYTHON=python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '$(if $(filter dev,$*),.[dev],.)'
	@touch $@

demo: $(VENV)/ready-run
	$(BIN)/lfm demo

test: $(VENV)/ready-dev lint compiled
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

test-all: $(VENV)/ready-dev lint types compiled
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m ''

lint: $(VENV)/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

# Tests start many processes; each would compile our sources anew where Python is told to write no bytecode.
compiled: $(VENV)/ready-dev
	$(BIN)/python -m compileall -q src

types: $(VENV)/ready-dev
	$(BIN)/pyright

docs: $(VENV)/ready-run
	$(BIN)/python docs/make_tables.py

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis out
