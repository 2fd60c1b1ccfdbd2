# make demo and make test need nothing before them but Python 3.11+, git and make: they fill .venv themselves, once.
SHELL := bash
.PHONY: help demo test slow lint types wheel clean
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
# The first Python that is new enough; `make PYTHON=/path/to/python3.12 test` picks another. Old ones are named in the error.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { command -v $$p; break; }; done)

# Two processes of one torch thread each: on two cores that takes little more than half the time of one process, and a second
# torch thread gains next to nothing on models this small. A file stays in one process, so what its tests share is made once.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

help:
	@echo "make demo    the demo, into flowkit-demo/ (ARGS=--fast for the short one; ARGS=--help for its options)"
	@echo "make test    the tests (ARGS='-k grids' for some of them, ARGS='-n 0' for one process)"
	@echo "make slow    the tests marked slow"
	@echo "make lint    ruff: check and format"
	@echo "make types   mypy: strict, package and tests"
	@echo "make wheel   build the wheel and try it outside the repository"
	@echo "make clean   remove .venv and what the tools left"

demo: $(VENV)/.test
	$(BIN)/flowkit demo $(ARGS)

test: $(VENV)/.test
	$(PYTEST) $(ARGS)

slow: $(VENV)/.test
	$(PYTEST) --run-slow -m slow $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy -p flowkit
	$(BIN)/mypy tests

wheel: $(VENV)/.dev
	$(BIN)/python tests/check_wheel.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# A stamp says that .venv holds the dependencies of this pyproject.toml.
$(VENV)/.test: EXTRAS := all,test
$(VENV)/.dev: EXTRAS := all,test,dev
$(VENV)/.test $(VENV)/.dev: pyproject.toml | $(BIN)/python
	@echo "Installing flowkit and what it needs into $(VENV): a few minutes and some gigabytes the first time (PyTorch)."
	@set -o pipefail; $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -e '.[$(EXTRAS)]' \
	| awk '/^ *(Downloading|Using cached) .*[0-9] [MG]B/ { sub(/^ +/, "  "); print; fflush() } /^Installing coll/ { print "  Installing"; fflush() }'
	@touch $@

$(BIN)/python:
	@if [ -z "$(PYTHON)" ]; then echo "flowkit needs Python 3.11 or newer; found $$(python3 --version 2>&1)." \
		"Install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; fi
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is" \
		"$$($(PYTHON) --version 2>&1): flowkit needs Python 3.11 or newer" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
