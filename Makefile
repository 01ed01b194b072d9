# `make help` lists the targets: every `name: ## text` line.
PYTHON ?= python3
SPEC ?= specs/super.toml
TARGET ?= trt
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.made

.DEFAULT_GOAL := help
.PHONY: help venv build test test-slow check lint types golden bench clean

help: ## List the targets.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-10s %s\n", $$1, $$2}'

venv: $(STAMP) ## Create .venv with everything that build and test need.

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "n3c needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[torch,trt,auto,dev]'
	$(BIN)/python -m compileall -q backends compiler ir passes specs
	@touch $@

build: venv ## Build SPEC (specs/super.toml) for TARGET (trt; or onnx, torch) into build/.
	$(BIN)/n3c build $(SPEC) --target $(TARGET)

test: venv ## Run the tests.
	$(BIN)/pytest -q

test-slow: venv ## Run the full-size builds too (Super and Ultra, several minutes).
	$(BIN)/pytest -q -m slow

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types: venv
	$(BIN)/mypy
	$(BIN)/pyright

check: lint types test ## Lint, types, import layers and tests: what every commit passes.

golden: venv ## Regenerate the golden files; review the diff.
	N3C_UPDATE_GOLDEN=1 $(BIN)/pytest -q $$(grep -rl 'import.*assert_golden' tests --include='test_*.py')

bench: venv ## Run the benchmarks and print their tables.
	$(BIN)/python -m benchmarks

clean: ## Remove builds and caches (not .venv).
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache ./*.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
