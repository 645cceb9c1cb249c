# Everything runs in a virtual environment of its own, .venv; a second call repeats nothing needless.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
MODEL := models/tlinformer-prose-8m
PROMPT := examples/new-testament.txt.xz
CUBLAS := nvidia-cublas==13.0.*
MAKEFLAGS += --no-print-directory

PACKAGE_FILES := setup.py pyproject.toml csrc/sources.txt $(shell find csrc -type f)
CXX_FILES := $(shell find csrc tests examples -name '*.cpp' -o -name '*.c' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help demo install test test-python test-cpp tsan cuda fuzz lint clean

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
	@$(BIN)/cmake -S . -B build/cpp -DTLINFORMER_SANITIZE=ON -DTLINFORMER_CUDA=OFF -DCMAKE_BUILD_TYPE=RelWithDebInfo -DTLINFORMER_SCIPY_OPENBLAS="$$($(BIN)/python -c \
	  'import scipy_openblas32 as b; print(*b.__path__)')" > build/cmake.log || (cat build/cmake.log; false)
	$(BIN)/cmake --build build/cpp -j $(shell nproc)
	$(BIN)/ctest --test-dir build/cpp --output-on-failure --no-tests=error

tsan: $(VENV)/installed $(VENV)/tools  ## two engines on two threads under ThreadSanitizer
	@mkdir -p build
	@$(BIN)/cmake -S . -B build/tsan -DTLINFORMER_SANITIZE=thread -DTLINFORMER_CUDA=OFF -DCMAKE_BUILD_TYPE=RelWithDebInfo -DTLINFORMER_SCIPY_OPENBLAS="$$($(BIN)/python -c \
	  'import scipy_openblas32 as b; print(*b.__path__)')" > build/cmake.log || (cat build/cmake.log; false)
	$(BIN)/cmake --build build/tsan -j $(shell nproc) --target test_threads
	$(BIN)/ctest --test-dir build/tsan -R test_threads --output-on-failure --no-tests=error

# Ninja keeps the compiler's words about one file together. The log grows by what is compiled anew.
cuda: $(VENV)/installed $(VENV)/tools build/cublas  ## compile, link and (with a GPU) test the CUDA engine; needs nvcc
	@command -v nvcc > /dev/null || { echo "make cuda needs nvcc, of CUDA 13.0, on PATH; no GPU"; exit 1; }
	@mkdir -p build/cuda
	@PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/cuda -G Ninja -DTLINFORMER_CUDA=ON -DCMAKE_CUDA_FLAGS=-Xptxas=-v \
	  -DTLINFORMER_CUBLAS="$(abspath build/cublas/nvidia/cu13)" -DTLINFORMER_SCIPY_OPENBLAS="$$($(BIN)/python -c \
	  'import scipy_openblas32 as b; print(*b.__path__)')" > build/cmake.log || (cat build/cmake.log; false)
	@echo "compiling the CUDA sources, which takes some minutes"
	@$(BIN)/cmake --build build/cuda >> build/cuda/ptxas.log 2>&1 || (grep -v 'ptxas info\|bytes stack frame' build/cuda/ptxas.log | tail -60; false)
	$(BIN)/python tests/check_spills.py build/cuda/ptxas.log
	$(BIN)/ctest --test-dir build/cuda --output-on-failure --no-tests=error

FUZZ_SECONDS ?= 600
FUZZ_SOURCES := tests/fuzz/fuzz_checkpoint.cpp $(addprefix csrc/runtime/,checkpoint.cpp config.cpp safetensors.cpp state_file.cpp)
fuzz: $(VENV)/installed  ## fuzz the readers of models and states for FUZZ_SECONDS; needs clang, in CLANG
	@mkdir -p build/fuzz
	$(or $(CLANG),clang++) -std=c++17 -g -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all \
	  -Icsrc -Icsrc/include $(FUZZ_SOURCES) -o build/fuzz/checkpoint
	$(BIN)/python tests/fuzz/seeds.py build/fuzz/corpus
	cd build/fuzz && ./checkpoint -max_total_time=$(FUZZ_SECONDS) -max_len=8192 -print_final_stats=1 corpus

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
	@echo "fetching PyTorch"
	$(BIN)/python -m pip install -q -U "setuptools>=77" ninja scipy-openblas32 "$(TORCH)"
	@touch $@

$(VENV)/installed: $(VENV)/python $(PACKAGE_FILES)
	@echo "compiling the engine, about a minute"
	$(BIN)/python -m pip install -q --no-build-isolation --config-settings editable_mode=compat -e .
	@touch $@

build/cublas:
	$(BIN)/python -m pip install -q --no-deps --target $@ "$(CUBLAS)"

$(VENV)/tools: pyproject.toml | $(VENV)/installed
	$(BIN)/python -m pip install -q --no-build-isolation --config-settings editable_mode=compat -e ".[dev]"
	@touch $@
