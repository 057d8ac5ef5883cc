# statescan: two commands do everything, `make demo` and `make test`; each makes .venv itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: setup demo test lint bench test-gpu lib clean

setup: $(VENV)/.ready

# torch first, in its CPU build where there is one, so that nothing else brings another build along.
$(VENV)/.ready: pyproject.toml CMakeLists.txt $(wildcard csrc/*.h csrc/*.cpp csrc/kernels/*.cpp)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install -q "torch==2.13.0" || $(BIN)/python -m pip install -q torch
	$(BIN)/python -m pip install -q -e ".[dev]"
	@touch $@

lib: ## rebuild the C++ kernels into the source tree (what developers run after editing csrc/)
	@$(BIN)/cmake -S . -B build/dev -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DCMAKE_BUILD_TYPE=Release > /dev/null
	@$(BIN)/cmake --build build/dev
	@$(BIN)/cmake --install build/dev --prefix src > /dev/null

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
	$(BIN)/statescan bench all

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

clean:
	rm -rf build $(VENV) src/statescan/_lib demo-out
