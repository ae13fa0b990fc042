PYTHON ?= python3
PYTEST_ARGS ?=
VENV ?= .venv

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
BUILD_TOOLS := setuptools pybind11 ninja cmake

# Stamps: the first is as old as the installed dependencies, the second as the compiled extension.
INSTALLED := $(VENV)/.installed
BUILT := $(VENV)/.built

# Threads that wait for a busy core should sleep, not spin: on a loaded machine it is three times as fast.
export OMP_WAIT_POLICY ?= passive

.DEFAULT_GOAL := help
# Installing builds the extension too and touches both stamps, so $(INSTALLED) must be looked at first.
.NOTPARALLEL:
.PHONY: help demo test lint docs sanitize bench gpu clean

help:  ## Show this list.
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' $(MAKEFILE_LIST)

demo: $(INSTALLED) $(BUILT)  ## Mark a small model and verify suspects.
	$(BIN)/activemark demo

test: $(INSTALLED) $(BUILT)  ## Run the tests (make test PYTEST_ARGS="tests/ops -x").
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile $(PYTEST_ARGS)

lint: $(INSTALLED)  ## Check style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror csrc/* $(shell find tests/ops/cuda_on_cpu -type f)
	$(BIN)/mypy activemark_fast

docs: $(INSTALLED) $(BUILT)  ## Build the site in build/site, and check its links.
	$(PIP) install --constraint constraints.txt sphinx myst-parser furo
	$(BIN)/python docs/build.py

# The package is imported from build/sanitize before conftest.py puts the sources first on the path. The sanitizer
# ends the process where memory is lacking.
sanitize: $(INSTALLED)  ## Run the tests of the C++ code, built with sanitizers.
	ACTIVEMARK_SANITIZE=ON ACTIVEMARK_CUDA=off $(BIN)/python setup.py --quiet build --build-base build/sanitize --build-lib build/sanitize
	cd build/sanitize && LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 $(abspath $(BIN))/python -m pytest --rootdir $(CURDIR) -p no:cacheprovider \
		-p activemark_fast -k "not cuda_kernel and not lack_of_memory" $(CURDIR)/tests/ops/test_magnitude.py $(CURDIR)/tests/test_painting.py

bench: $(INSTALLED) $(BUILT)  ## Run the benchmarks (PYTEST_ARGS=--quick: 10 minutes).
	$(BIN)/python -m pytest benchmarks --benchmark-only --plot build/embed_minutes.svg $(PYTEST_ARGS)
	rm -f build/families.jsonl
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/families.py --out build/models.md

gpu:  ## On a GPU: build, test and measure, with python3's own packages and no network (PYTHON=... for another).
	$(PYTHON) benchmarks/gpu.py

clean:  ## Remove everything that make and the tools made, .venv included.
	rm -rf .venv* build dist *.egg-info activemark_fast/*.so
	rm -rf .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@echo "Installing into $(VENV): several GB with torch, about two minutes"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt $(BUILD_TOOLS)
	$(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[test,dev]'
	@touch $(INSTALLED) $(BUILT)

$(BUILT): setup.py CMakeLists.txt $(wildcard csrc/*)
	@echo "Building the extension"
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $(BUILT)
