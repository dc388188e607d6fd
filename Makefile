# The commands of this repository. `make` lists them.

PYTHON      ?= python3
VENV        ?= .venv
# Extra arguments for pip, such as an index of CPU-only torch builds.
PIP_ARGS    ?=
# The versions to install.
CONSTRAINTS ?= constraints.txt
# Arguments for the demo.
ARGS        ?=
# Arguments for pytest, such as "-m slow" or "-k enums".
PYTEST_ARGS ?=
# Parallel test processes. Each keeps to one thread, so they do not fight over the cores, and to whole modules, so what a
# module sets up once is set up once.
WORKERS     ?= 2

BIN   := $(VENV)/bin
READY := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help finetune test bench lint docs format clean

help: ## List the commands and their settings
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo '  Settings (make finetune ARGS="--help"):'
	@echo '    ARGS         arguments for the fine-tuning demo'
	@echo '    PYTEST_ARGS  arguments for pytest ("-m slow" runs the convergence tests)'
	@echo '    PYTHON       interpreter that creates the environment, 3.10 or newer   [$(PYTHON)]'
	@echo '    CONSTRAINTS  versions to install; with constraints-lowest.txt give a VENV too    [$(CONSTRAINTS)]'
	@echo '    VENV         where the environment lies                               [$(VENV)]'
	@echo '    PIP_ARGS     extra arguments for pip, such as an index of CPU builds of torch'

finetune: $(READY) ## Fine-tune a small model with AdamW and with RotationalAdamW, and compare
	$(BIN)/hf-rotational demo $(ARGS)

test: $(READY) ## Run the tests (all but those marked slow)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope $(PYTEST_ARGS)

bench: $(READY) ## Time a step of every optimizer, and write benchmarks/results/optimizer_speed.json
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -e ".[bench]" -c $(CONSTRAINTS)
	$(BIN)/python -m benchmarks.optimizer_speed

lint: $(READY) ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY) ## Build the documentation into build/site; broken links are errors
	$(BIN)/mkdocs build --strict

format: $(READY) ## Rewrite the code the way lint wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the environment, caches and build outputs
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Rebuilt when the dependencies change; otherwise every target starts at once.
$(READY): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo 'hf-rotational needs Python 3.10 or newer, and "$(PYTHON)" is not that. Name another: make PYTHON=python3.12 ...' >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo '"$(PYTHON)" cannot create virtual environments. On Debian and Ubuntu: apt install python3-venv' >&2; \
	  exit 1; }
	@echo 'Installing into $(VENV) (once; PyTorch is a large download)'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -e ".[demo,test,lint,docs]" -c $(CONSTRAINTS)
	@touch $@
