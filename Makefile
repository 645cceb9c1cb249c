# Everything runs in a virtual environment of its own, .venv; a second call repeats nothing needless.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
MODEL := models/tlinformer-prose-8m
PROMPT := examples/new-testament.txt.xz
MAKEFLAGS += --no-print-directory

PACKAGE_FILES := setup.py pyproject.toml csrc/sources.txt $(shell find csrc -name '*.cpp' -o -name '*.h')
CXX_FILES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help demo install test test-python test-cpp lint clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/installed  ## install, then continue a long prompt with the shipped model
	$(BIN)/tlinformer generate --model $(MODEL) --prompt-file $(PROMPT) --max-new-tokens 256

install: $(VENV)/installed  ## create .venv with torch and the package (editable)

# Small models do little between barriers; threads that spin there starve each other on busy cores.
test: export OMP_WAIT_POLICY = passive
test: test-cpp test-python  ## run the C++ and the Python tests

test-python: $(VENV)/installed $(VENV)/tools
	$(BIN)/python -m pytest

test-cpp: $(VENV)/installed $(VENV)/tools
	@mkdir -p build
	@$(BIN)/cmake -S . -B build/cpp -DTLINFORMER_SANITIZE=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo -DTLINFORMER_SCIPY_OPENBLAS="$$($(BIN)/python -c \
	  'import scipy_openblas32 as b; print(*b.__path__)')" > build/cmake.log || (cat build/cmake.log; false)
	$(BIN)/cmake --build build/cpp -j $(shell nproc)
	$(BIN)/ctest --test-dir build/cpp --output-on-failure --no-tests=error

lint: $(VENV)/installed $(VENV)/tools  ## check format, style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

clean:  ## remove what was built, and .venv
	rm -rf build $(VENV) *.egg-info tlinformer/*.so

$(VENV)/python:
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10)' 2> /dev/null || \
	  { echo "tlinformer needs Python 3.10 or newer, not '$(PYTHON)' ($$($(PYTHON) --version 2>&1)): make PYTHON=python3.x"; exit 1; }
	@command -v $${CXX:-c++} > /dev/null || \
	  { echo "tlinformer needs a C++ compiler: install g++, or name one in CXX"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -U "setuptools>=77" ninja scipy-openblas32 "$(TORCH)"
	@touch $@

$(VENV)/installed: $(VENV)/python $(PACKAGE_FILES)
	$(BIN)/python -m pip install -q --no-build-isolation -e .
	@touch $@

$(VENV)/tools: pyproject.toml | $(VENV)/installed
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[dev]"
	@touch $@
