# Everything from nothing: each target makes the environment that it needs (Python 3.10 or newer is all it asks for).
#   make demo     train five small adapters side by side on real images, a few minutes on two CPU cores
#   make test     every test            (PYTEST_ARGS="tests/test_cli.py -k list" for a part)
#   make table    every method on every family, where the tests take a sample
#   make seg      mmsegmentation beside all that: its mmcv is compiled (minutes), then the tests that need it
#   make lint     ruff and mypy         make format   lay the code out, fix what can be fixed, write README's table of methods
#   make docs     the documentation, into site/
#   make lock     the exact versions that all of these install, anew: requirements/lock-py*.txt
#   make latest   every test on the newest releases of everything, in an environment of its own, and what broke

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
PYTEST_WORKERS ?= 2
DEMO_ARGS ?=
SEG_TESTS := tests/vision/mmseg

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CODE := zoo vision multimodal audio tests benchmarks scripts docs

# Exact versions where there is a lock for this Python, else the newest that the ranges of pyproject.toml allow
LOCK = $$($(BIN)/python -c 'import os, sys; lock = "requirements/lock-py%d%d.txt" % sys.version_info[:2]; print("-c " + lock if os.path.exists(lock) else "")')

.PHONY: demo test seg table lint format docs lock latest install dev clean help

help:
	@sed -n 's/^#  *make/  make/p' Makefile

demo: install
	$(BIN)/zoo demo $(DEMO_ARGS)

test: dev
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) $(PYTEST_ARGS)

table: dev
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) --whole -m rest $(PYTEST_ARGS) tests

# What was compiled is kept for this torch in ~/.cache/adapter-zoo, so that it is compiled once
seg: $(VENV)/.installed-seg
	$(BIN)/python -m pytest $(SEG_TESTS) $(PYTEST_ARGS)

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

# Run the suite before committing what comes out
lock: dev
	$(PIP) install --quiet 'uv>=0.9,<0.14'
	$(BIN)/python scripts/lock.py

# No lock and no upper ends: what a release of somebody else would do to us
latest:
	$(PYTHON) -m venv --clear $(VENV)-latest
	$(VENV)-latest/bin/python -m pip --disable-pip-version-check install --quiet packaging
	$(VENV)-latest/bin/python scripts/latest.py --workers $(PYTEST_WORKERS) $(PYTEST_ARGS)

install: $(VENV)/.installed
dev: $(VENV)/.installed-dev

# The stamps depend on pyproject.toml and the locks: nothing is installed twice, and a changed dependency is installed at once.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "adapter-zoo needs Python 3.10 or newer; '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Name another: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml $(wildcard requirements/*.txt) | $(BIN)/python
	$(PIP) install --quiet $(LOCK) -e '.[demo]'
	$(BIN)/python scripts/check_install.py
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(wildcard requirements/*.txt) | $(BIN)/python
	$(PIP) install --quiet $(LOCK) -e '.[dev]'
	$(BIN)/python scripts/check_install.py
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-seg: $(VENV)/.installed-dev
	$(PIP) install --quiet $(LOCK) -e '.[dev,seg]'
	$(BIN)/zoo install-mmcv
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-latest site build dist .pytest_cache .mypy_cache .ruff_cache
