# Everything from nothing: each target makes the environment that it needs (Python 3.10 or newer is all it asks for).
#   make demo     train five small adapters side by side on real images, a few minutes on two CPU cores
#   make test     every test            (PYTEST_ARGS="tests/test_cli.py -k list" for a part)
#   make lint     ruff and mypy         make format   lay the code out, fix what can be fixed, write README's table of methods
#   make docs     the documentation, into site/

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
DEMO_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CODE := zoo vision multimodal audio tests benchmarks scripts docs

.PHONY: demo test lint format docs install dev clean help

help:
	@sed -n 's/^#  *make/  make/p' Makefile

demo: install
	$(BIN)/zoo demo $(DEMO_ARGS)

test: dev
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: dev
	$(BIN)/ruff check $(wildcard $(CODE))
	$(BIN)/ruff format --check $(wildcard $(CODE))
	$(BIN)/mypy

format: dev
	$(BIN)/ruff check --fix $(wildcard $(CODE))
	$(BIN)/ruff format $(wildcard $(CODE))
	$(BIN)/python scripts/readme.py

docs: dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir site

install: $(VENV)/.installed
dev: $(VENV)/.installed-dev

# The stamps depend on pyproject.toml: nothing is installed twice, and a changed dependency is installed at once.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "adapter-zoo needs Python 3.10 or newer; '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Name another: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(PIP) install --quiet -e '.[demo]'
	$(BIN)/python scripts/check_install.py
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(PIP) install --quiet -e '.[dev]'
	$(BIN)/python scripts/check_install.py
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) site build dist .pytest_cache .mypy_cache .ruff_cache
