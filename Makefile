# `make help` lists the targets: every `name: ## text` line.
PYTHON ?= python3
SPEC ?= specs/super.toml
TARGET ?= trt
ENTRY ?= decode
JOBS ?= 2
CHROMIUM ?= /usr/bin/chromium
BUDGET ?= 900
READER ?= spec
SECONDS ?= 60
SEED ?= 1
COUNT ?= 300
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.made
ORACLES := .venv-oracles
READERS := .venv-oracles-readers
RAY := .venv-oracles-ray

.DEFAULT_GOAL := help
.PHONY: help venv build test test-slow test-oracles test-readers test-browser test-ray docs fuzz mutants gpu check lint types types-mypy types-win32 types-darwin types-pyright golden bench ablations demo clean

help: ## List the targets.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-10s %s\n", $$1, $$2}'

venv: $(STAMP) ## Create .venv with everything that build and test need.

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "n3c needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --no-compile --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[torch,trt,run,serve,auto,dev]'
	$(BIN)/python -m compileall -q backends compiler ir passes runtime specs
	@touch $@

build: venv ## Build SPEC (specs/super.toml) for TARGET (trt; or onnx, torch): decode plans, or those of ENTRY (all).
	$(BIN)/n3c build $(SPEC) --target $(TARGET) $(if $(filter torch,$(TARGET))$(filter all,$(ENTRY)),,--entry $(ENTRY))

test: venv ## Run the tests, JOBS (2) files at a time, each with one thread: more would wait for each other.
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/pytest -q --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

test-slow: venv ## Run the full-size builds too (Super and Ultra, several minutes).
	$(BIN)/pytest -q -m slow

test-oracles: test-readers $(ORACLES)/.made ## And what needs torchtitan, Megatron-core and Triton (makes .venv-oracles, 2.5 GB).
	TRITON_INTERPRET=1 $(ORACLES)/bin/pytest -q -m oracles $$(grep -rl --exclude-dir=readers 'pytest.mark.oracles' tests)

test-readers: venv $(READERS)/.made ## Let vLLM, SGLang, Edge-LLM, llama.cpp and others read checkpoints (makes .venv-oracles-readers, 2 GB).
	$(BIN)/pytest -q -m oracles tests/readers

# The readers' own code, but for kernels: of the wheels (600 MB) only Python files are kept.
$(READERS)/.made: constraints-readers.txt tests/readers/unpack.py
	$(PYTHON) -m venv $(READERS)
	$(READERS)/bin/pip install --quiet --disable-pip-version-check --requirement constraints-readers.txt
	$(READERS)/bin/pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
		--dest $(READERS)/archives vllm==0.33.0 sglang==0.5.23 tensorrt-edgellm==0.11.0
	$(READERS)/bin/pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-python \
		--dest $(READERS)/archives llama-cpp-python==0.3.36
	$(READERS)/bin/python tests/readers/unpack.py $(READERS)
	@touch $@

# The wheels of Megatron-core (Python 3.12, CUDA) and Transformer Engine (CUDA) are only unpacked.
# Of mamba_ssm only the Triton kernels are wanted: no CUDA extension is built.
$(ORACLES)/.made: pyproject.toml constraints-oracles.txt
	$(PYTHON) -m venv $(ORACLES)
	$(ORACLES)/bin/pip install --quiet --disable-pip-version-check --constraint constraints-oracles.txt --editable '.[torch,oracles,trainers]'
	$(ORACLES)/bin/pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --python-version 3.12 \
		--dest $(ORACLES)/wheels megatron-core==0.19.2
	$(ORACLES)/bin/python -m zipfile -e $(ORACLES)/wheels/megatron_core-0.19.2-*.whl $(ORACLES)/megatron
	$(ORACLES)/bin/pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
		--dest $(ORACLES)/wheels transformer_engine==2.20.2
	$(ORACLES)/bin/python -m zipfile -e $(ORACLES)/wheels/transformer_engine-2.20.2-*.whl $(ORACLES)/transformer_engine
	MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE $(ORACLES)/bin/pip install --quiet --disable-pip-version-check \
		--constraint constraints-oracles.txt --no-deps --no-build-isolation --no-binary mamba-ssm mamba-ssm
	@touch $@

test-browser: venv ## Try the pages of inspect and diff in CHROMIUM (/usr/bin/chromium), headless.
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[browser]'
	CHROMIUM=$(CHROMIUM) $(BIN)/pytest -q -m browser tests/compiler/report

test-ray: $(RAY)/.made ## Serve with Ray: two replicas, one of which is killed under load (makes .venv-oracles-ray, 1.3 GB).
	$(RAY)/bin/pytest -q -m ray tests/ray_serve

$(RAY)/.made: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(RAY)
	$(RAY)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable '.[torch,run,serve,ray]' pytest pytest-timeout hypothesis
	@touch $@

docs: venv ## Build the site of docs/ into build/site, strictly: a link to nothing fails.
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	$(BIN)/zensical build --strict

fuzz: venv ## Fuzz READER (spec; all of tests/support/file_readers.py in turn: all) for SECONDS (60) with SEED (1).
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[fuzz]'
	cd tests && for reader in $(if $(filter all,$(READER)),$(notdir $(wildcard tests/corpus/*)),$(READER)); do \
		../$(BIN)/python -m fuzz $$reader $(SECONDS) $(SEED) || exit; done

gpu: ## Collect what a GPU shows into build/gpu, in BUDGET (900) seconds; needs torch, Triton, transformers in PYTHON.
	PYTHONPATH=typings $(PYTHON) -m benchmarks gpu --budget $(BUDGET)

mutants: venv ## Change COUNT (300) random points of the code, one at a time, and count which the tests notice (SEED).
	$(BIN)/python -m benchmarks.mutants --count $(COUNT) --seed $(SEED)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types: types-mypy types-win32 types-darwin types-pyright

types-mypy: venv
	$(BIN)/mypy

types-win32 types-darwin: types-%: venv
	$(BIN)/mypy --platform $* --cache-dir .mypy_cache/$* typings/n3c

types-pyright: venv
	$(BIN)/pyright

check: lint types test ## Lint, types, import layers and tests: what every commit passes.

golden: venv ## Regenerate the golden files; review the diff.
	N3C_UPDATE_GOLDEN=1 $(BIN)/pytest -q $$(grep -rl 'import.*assert_golden' tests --include='test_*.py')

bench: venv ## Run the benchmarks and print their tables (adds their peers to .venv).
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m benchmarks

ablations: venv ## Train the arms of docs/ablations.md with every seed (an hour and more), and write that page.
	$(BIN)/python -m benchmarks.ablations

demo: venv ## Train, quantize, build, verify and generate with a tiny model, from nothing (about 10 minutes).
	$(BIN)/python -m benchmarks.demo

clean: ## Remove builds and caches (not .venv).
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache ./*.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -not -path './$(ORACLES)/*' -prune -exec rm -rf {} +
