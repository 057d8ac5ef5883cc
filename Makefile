# statescan: two commands do everything, `make demo` and `make test`; each makes .venv itself.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Two test processes share the cores: a thread that waits must not spin.
export OMP_WAIT_POLICY = PASSIVE

.PHONY: setup demo test lint bench test-gpu lib clean

setup: $(VENV)/.ready
	@$(MAKE) --no-print-directory lib

# torch comes first (its CPU build where the index offers one under this version), so that nothing else brings another
# build along. The package is installed editable and without its C++: `make lib` builds that into the source tree.
$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "statescan needs Python 3.11 or newer: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q --upgrade pip
	$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) install -q "$(TORCH)" || $(PIP) install -q torch
	$(PIP) install -q -e ".[dev]" --config-settings=wheel.cmake=false
	@touch $@

# The C++ kernels, into src/statescan/_lib. Without a working compiler everything still runs, on the torch backend.
lib:
	@mkdir -p build
	@if $(BIN)/cmake -S . -B build/dev -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DCMAKE_BUILD_TYPE=Release > build/dev.log 2>&1; \
	then $(BIN)/cmake --build build/dev && $(BIN)/cmake --install build/dev --prefix src > /dev/null; \
	else rm -rf build/dev; echo "no working C++17 compiler (build/dev.log): going on without the C++ kernels"; fi

demo: setup
	$(BIN)/statescan demo --out demo-out

test: setup
	$(BIN)/python -m pytest -m "not gpu" -n 2 --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: setup
	$(PIP) install -q -e ".[dev,peers]" --config-settings=wheel.cmake=false
	$(BIN)/statescan bench all

# On a machine that has its own Python with torch, and where nothing shall be installed: make test-gpu PYTHON_GPU=python3
# The first run compiles every kernel, which takes the processor: several workers share the GPU, but for what fills it.
PYTHON_GPU ?= $(BIN)/python
GPU_WORKERS ?= 8
# It fails where nothing was sanitized (compute-sanitizer missing, a backend that can't run): SANITIZE=--may-skip takes that.
SANITIZE ?=
test-gpu: $(if $(filter $(BIN)/python,$(PYTHON_GPU)),setup)
	PYTHONPATH=src $(PYTHON_GPU) -m pytest -m "gpu and not large" -n $(GPU_WORKERS) --dist worksteal
	PYTHONPATH=src $(PYTHON_GPU) -m pytest -m large
	PYTHONPATH=src STATESCAN_TEST_DEVICE=cuda $(PYTHON_GPU) -m pytest -m "not gpu" -n $(GPU_WORKERS) --dist worksteal $$(grep -rl --include='test_*.py' --exclude-dir=gpu TEST_DEVICE tests)
	PYTHONPATH=src $(PYTHON_GPU) tests/gpu/sanitize.py $(SANITIZE)

clean:
	rm -rf build $(VENV) src/statescan/_lib demo-out
