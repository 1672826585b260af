# `make test` and `make demo` set up everything that they need in $(VENV), on a machine with only Python >= 3.11.
#
# Torch comes first and by its exact version: left to the dependency, a plain `torch` from the public index
# brings gigabytes of CUDA libraries. Choose another build with, for example,
#     make test TORCH="torch==2.13.0 --index-url <the index of your CUDA or CPU wheels>"
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
ARGS   ?=
# Files of tests at a time. Many tests start two to four processes themselves.
JOBS   ?= 2
# `make gpu-check` needs torch with CUDA and a C++ compiler in $(PYTHON)'s environment, and no network: what else it needs
# comes from the folder that `make gpu-wheels` fills elsewhere, e.g. ARGS='--python 3.12 --machine x86_64'.
WHEELS  ?= gpu-wheels
MINUTES ?= 8

# What clang-format looks at.
CXX_FILES = $(shell find csrc benchmarks -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')

BIN       := $(abspath $(VENV))/bin
INSTALLED := $(VENV)/.installed-test
LINTERS   := $(VENV)/.installed-dev
DOCTOOLS  := $(VENV)/.installed-docs
RELEASE   := $(VENV)/.installed-release

export PATH := $(BIN):$(PATH)
# The launcher gives each process one core; more threads than that only fight each other.
export OMP_NUM_THREADS := 1
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# A build of a DeepSpeed op that was killed leaves a lock on which every later launch waits silently and for ever.
export TORCH_EXTENSIONS_DIR := $(abspath $(VENV))/torch_extensions

.PHONY: help setup test test-all demo lint docs wheel benchmark peers gpu-wheels gpu-check clean

help:
	@echo "make test       set up $(VENV), run all tests            (ARGS='-k radix -x' goes to pytest; JOBS=1)"
	@echo "make test-all   the same, with every cell of the grids of cases"
	@echo "make demo       set up $(VENV), compress a real encoder  (ARGS='--output DIR' goes to the demo)"
	@echo "make benchmark  step-time ratios to plain DeepSpeed, quick"
	@echo "make peers      what a user would pick instead, beside ours (ARGS='--job training' or '--only encoder_ours encoder_nncf'; makes .venv-peers)"
	@echo "make gpu-wheels fill $(WHEELS) with what gpu-check needs beyond torch (ARGS='--python 3.12')"
	@echo "make gpu-check  on a machine with a GPU: tests and figures against their goals (MINUTES=8)"
	@echo "make lint       ruff, mypy, clang-format, typos, vulture, import-linter, hadolint, and whether tables and workflows are in order"
	@echo "make docs       build the documentation into site/, warnings are errors"
	@echo "make wheel      sdist, and the wheel with the compiled CPU library, into dist/"
	@echo "make clean      remove $(VENV), .venv-gpu and .venv-peers"

setup: $(INSTALLED)

$(BIN)/python:
	@echo "==> creating $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml setup.py | $(BIN)/python
	@echo "==> installing torch, then ds_compress with its test tools (a few minutes the first time)"
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install -e '.[test,cuda-build]'
	# Headers for Hopper's products; what the package asks for besides is for its Python side.
	$(BIN)/python -m pip install --no-deps nvidia-cutlass==4.2.0.0
	# A second oracle for robust rules, skipped without it (its dependencies would replace torch); the first needs nothing.
	-$(BIN)/python -m pip install --no-deps 'byzfl>=0.0.11,<0.1'
	@touch $@

$(LINTERS): $(INSTALLED)
	@echo "==> installing the linters"
	$(BIN)/python -m pip install -e '.[dev]'
	@touch $@

# The library with everything in it first: by all cores, and before any test waits for it.
test: $(INSTALLED)
	-$(BIN)/python -m ds_compress.ops --cuda
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

# Every cell of the grids that take turns in `make test` (tests/grids.py): about twice the time.
test-all: export DS_COMPRESS_TESTS = all
test-all: test

demo: $(INSTALLED)
	$(BIN)/python -m ds_compress.examples.demo $(ARGS)

benchmark: $(INSTALLED)
	$(BIN)/python -m benchmarks.step_overhead --quick $(ARGS)

# Each peer in a pinned environment of its own, in .venv-peers: some gigabytes.
peers: $(INSTALLED)
	$(BIN)/python -m benchmarks.peers $(ARGS)

gpu-wheels:
	$(PYTHON) -m benchmarks.gpu_wheels collect $(WHEELS) $(ARGS)

gpu-check:
	@if [ -d "$(WHEELS)" ]; then $(PYTHON) -m benchmarks.gpu_wheels install "$(WHEELS)" .venv-gpu; fi
	@python=.venv-gpu/bin/python; [ -x $$python ] || python=$(PYTHON); \
	    exec $$python -m benchmarks.gpu_check --minutes $(MINUTES) $(ARGS)

lint: $(LINTERS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/typos
	$(BIN)/vulture
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/python -m benchmarks.figures --check
	$(BIN)/mypy

$(DOCTOOLS): $(INSTALLED)
	@echo "==> installing mkdocs"
	$(BIN)/python -m pip install -e '.[docs]'
	@touch $@

docs: $(DOCTOOLS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(RELEASE): $(INSTALLED)
	@echo "==> installing what a release is made with"
	$(BIN)/python -m pip install -e '.[release]'
	@touch $@

# The wheel comes from the sdist, so that one which lacks a file shows here. The tag is what Debian 12's C library allows;
# auditwheel refuses it where another machine's does not. torch's libraries are those of the user's torch.
wheel: $(RELEASE)
	rm -rf dist build/wheel
	$(BIN)/python -m build --no-isolation --sdist --outdir dist
	DS_COMPRESS_BUILD_OPS=1 DS_COMPRESS_CUDA=0 $(BIN)/python -m pip wheel --no-build-isolation --no-deps --wheel-dir build/wheel dist/*.tar.gz
	$(BIN)/auditwheel repair --plat manylinux_2_34_x86_64 --exclude 'libtorch*.so' --exclude libc10.so --wheel-dir dist build/wheel/*.whl
	ls -l dist

clean:
	rm -rf $(VENV) .venv-gpu .venv-peers site
