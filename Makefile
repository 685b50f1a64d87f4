# Every target makes .venv first, once; `make` alone lists the targets.
SHELL := bash
PYTHON ?= python3
TORCH_INDEX ?=
DATA ?=
ARGS ?=
MARK ?= not slow and not exhaustive
BIN := .venv/bin
INSTALLED := .venv/.installed
.DEFAULT_GOAL := help
.PHONY: help demo test check bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=...       the Python (>= 3.10) that makes .venv (python3)"
	@echo "  TORCH_INDEX=...  a package index that holds PyTorch's CPU builds, for a machine without a GPU"

demo: $(INSTALLED) ## train, compile and export a small sparse model (DATA=path for your own data)
	@$(BIN)/padst demo $(if $(DATA),--data "$(DATA)") $(ARGS)

test: $(INSTALLED) ## run the tests (MARK="not exhaustive" adds the slow ones, MARK= runs all: hours)
	@OMP_NUM_THREADS=1 $(BIN)/pytest -q -n auto --maxprocesses=8 --dist=loadgroup -m "$(MARK)" $(ARGS)

check: $(INSTALLED) ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED) ## time single layers against every peer; whole models with ARGS="--models"
	@$(BIN)/padst bench cpu $(ARGS)

clean: ## remove .venv, caches and built files
	rm -rf .venv build dist *.egg-info padst-demo .coverage htmlcov
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

# Without a GPU the tested release is asked for by number, so that a CPU build of it is taken where
# one is at hand; with a GPU any supported release will do. An interrupted install starts again.
$(INSTALLED): pyproject.toml
	@command -v "$(PYTHON)" > /dev/null || { \
	  echo "Expected Python 3.10 or newer. Got no $(PYTHON). Install it, or name one: make PYTHON=python3.12." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "Expected Python 3.10 or newer. Got $$("$(PYTHON)" --version 2>&1). Name another: make PYTHON=python3.12." >&2; exit 1; }
	@echo "Installing into .venv: once, a few minutes."
	@"$(PYTHON)" -m venv .venv
	@$(BIN)/python -m pip install -qq --upgrade pip
	@if command -v nvidia-smi > /dev/null && nvidia-smi -L 2> /dev/null | grep -q GPU; then \
	  $(BIN)/python -m pip install -qq 'torch>=2.11'; \
	else \
	  $(BIN)/python -m pip install -qq $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") 'torch==2.13.0'; \
	fi
	@$(BIN)/python -m pip install -qq --editable '.[dev]'
	@touch $@
