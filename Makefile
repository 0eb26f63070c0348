# All targets use .venv, which the first one builds from pyproject.toml and constraints.txt.
PYTHON ?= python3
WORKERS ?= 2
PORT ?= 5000

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup train test quick lint bench ui docs clean

export PIP_DISABLE_PIP_VERSION_CHECK := 1
BIN := .venv/bin
# The scripts of tools in .venv/bin start with the path of the interpreter, which may contain a quote.
PYTHON_M := $(BIN)/python -m
# Two test files at a time: end-to-end tests mostly wait for processes to start.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder
PIP := $(PYTHON_M) pip --quiet install --no-compile --constraint constraints.txt

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-7s %s\n", $$1, $$2 }' Makefile

setup: .venv/.dev ## build .venv, including the development tools

train: .venv/.run data/demo/index.json ## render the demo dataset, train, register the model, show the result
	$(BIN)/python jobs/train.py --preset demo --data data/demo --workers $(WORKERS)

test: .venv/.dev ## run all tests, including those that start Ray and MLflow
	$(PYTHON_M) pytest $(PARALLEL)

quick: .venv/.dev ## run the tests that need neither Ray nor minutes
	$(PYTHON_M) pytest $(PARALLEL) -m "not end_to_end and not slow"

lint: .venv/.dev ## check style, format, types and imports
	$(PYTHON_M) ruff check .
	$(PYTHON_M) ruff format --check .
	$(PYTHON_M) mypy
	PYTHONPATH=platform $(BIN)/python -c "from importlinter.cli import lint_imports_command as lint; lint()"

bench: .venv/.dev ## run every benchmark in benchmarks/, one after the other
	for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

ui: .venv/.run ## open runs, curves, figures and models at http://127.0.0.1:5000 (another port: PORT=5001)
	$(PYTHON_M) crowdray.console.ui --port $(PORT)

docs: .venv/.dev ## serve the documentation at http://127.0.0.1:8000
	NO_MKDOCS_2_WARNING=1 $(PYTHON_M) mkdocs serve --strict --dev-addr 127.0.0.1:8000

clean: ## remove .venv, caches and the demo dataset; keep runs and models
	rm -rf .venv data/demo build dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis platform/*.egg-info
	find platform jobs tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

data/demo/index.json: | .venv/.run
	$(BIN)/python jobs/convert.py synthetic --dest data/demo

# `make train` does not install the development tools. Bytecode is compiled once, on all cores: where writing it is
# disabled, each of Ray's processes would compile about 2,000 modules at every start.
.venv/.run: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "crowdray needs Python 3.11 or newer, " \
		"$(PYTHON) is " + sys.version.split()[0] + ": name another, as in make train PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing into .venv, once: this takes a minute or two"
	$(PIP) --editable .
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -W ignore -m compileall -qq -j 0 -x /tests/ .venv/lib || true # some are templates
	touch $@

.venv/.dev: .venv/.run
	@echo "Adding the development tools to .venv"
	$(PIP) --editable '.[dev,docs]'
	touch $@
