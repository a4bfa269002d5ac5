# `make demo` and `make test` set up everything they need in .venv; see README.md.
PYTHON ?= python3
VENV ?= .venv
# What pip installs torch from; a CPU-only build is enough for everything but the GPU targets.
TORCH ?= torch torchvision

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*)
CXX_FILES := $(wildcard csrc/*.cpp csrc/*.h)

.PHONY: demo test lint bench clean

demo: $(INSTALLED)
	$(BIN)/skipvit demo

test: lint
	SKIPVIT_REQUIRE=cpu $(BIN)/pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

bench: $(INSTALLED)
	$(BIN)/pytest benchmarks/ --benchmark-only

# Without build isolation the kernels are built against the torch that runs them, and pip does not
# download torch a second time.
$(INSTALLED): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH) "setuptools>=77" "cmake>=3.24" ninja "pybind11>=2.13"
	SKIPVIT_BUILD_CPP=1 $(BIN)/pip install --quiet --no-build-isolation --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info skipvit_kernels/_C*.so demo_results
