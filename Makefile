# `make demo` and `make test` set up everything they need in .venv; see README.md.
PYTHON ?= python3
VENV ?= .venv
# What pip installs torch from; a CPU-only build is enough for everything but the GPU targets.
TORCH ?= torch torchvision

# REQUIRE_GPU= shows that test-gpu starts on a machine without a GPU: it skips, and says so.
REQUIRE_GPU ?= triton

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*)
CXX_FILES := $(wildcard csrc/*.cpp csrc/*.h ascend_ops/*.cpp ascend_ops/*.h ascend_ops/*/*.cpp \
  ascend_ops/*/*.h tests/ascend/*.cpp tests/ascend/*.h tests/ptx/*.cpp)

.PHONY: demo test test-cpu test-interpreter test-ptx test-sanitizers test-gpu lint bench bench-gpu \
  clean

demo: $(INSTALLED)
	$(BIN)/skipvit demo

# Tests run on one thread each, so two of these at a time; what each printed comes when it ends.
test: $(INSTALLED)
	$(MAKE) --no-print-directory -j2 --output-sync=target test-cpu test-interpreter test-ptx \
	  test-sanitizers lint

# The shared operator suite once more for each instruction set: a machine runs one of them only.
test-cpu: $(INSTALLED)
	SKIPVIT_REQUIRE=cpu,npu-model $(BIN)/pytest
	for isa in $$($(BIN)/python tests/other_isas.py); do \
	  SKIPVIT_CPU_ISA=$$isa SKIPVIT_REQUIRE=cpu $(BIN)/pytest -q tests/ops/test_operators.py -k cpu || exit; \
	done

# The Triton kernels in Triton's interpreter, without a GPU; about 1.5 ms a program, so float16,
# which takes the paths of bfloat16, and the longest rows, which take those of any, are left to a
# GPU. TRITON_INTERPRET must be set at import.
test-interpreter: $(INSTALLED)
	TRITON_INTERPRET=1 PYTHONPATH=tests SKIPVIT_REQUIRE=triton $(BIN)/pytest \
	  tests/ops/test_operators.py tests/ops/test_sweep.py tests/backends/test_triton_interpreter.py \
	  -k "(triton and not same_bits_every and not torch.float16 and not (1x2100 and (gather_rows or scatter_back))) \
	    or test_triton_interpreter"

# The PTX that Triton compiles for sm_90, executed on a CPU with every access checked, without a GPU:
# the shared suite and the mutation check; at the end it lists the kernels that were executed. Half
# of the time is Triton's compiler, 0.2 s for each kind of arguments, so left out are float16, which
# takes the paths of bfloat16, and of float64, which no model trains in, all but one odd shape.
test-ptx: $(INSTALLED)
	PYTHONPATH=tests SKIPVIT_REQUIRE=triton $(BIN)/pytest -p ptx.executed \
	  tests/ops/test_operators.py tests/ptx -k "not torch.float16 and (not torch.float64 or 37)"

# The CPU operators in a copy of the package with the kernels under ASan and UBSan: a byte read past
# a tensor, or undefined behaviour, ends the run. --capture=sys leaves their report on the terminal;
# without libstdc++ loaded before Python, ASan ends the run at the first exception.
SANITIZED := $(CURDIR)/build/sanitized
test-sanitizers: $(INSTALLED)
	rm -rf $(SANITIZED)/lib
	mkdir -p $(SANITIZED)/lib
	cp -r skipvit_kernels $(SANITIZED)/lib
	rm -f $(SANITIZED)/lib/skipvit_kernels/*.so
	export PATH="$(abspath $(BIN)):$$PATH" && cmake -G Ninja -S . -B $(SANITIZED)/cmake \
	  -DSKIPVIT_SANITIZE=ON -DCMAKE_CXX_COMPILER=$(CXX) -DPython_EXECUTABLE=$(abspath $(BIN))/python \
	  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(SANITIZED)/lib/skipvit_kernels && \
	  cmake --build $(SANITIZED)/cmake
	for isa in "" $$($(BIN)/python tests/other_isas.py); do \
	  SKIPVIT_CPU_ISA=$$isa SKIPVIT_REQUIRE=cpu PYTHONPATH=$(SANITIZED)/lib \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:allocator_may_return_null=1 \
	  UBSAN_OPTIONS=print_stacktrace=1 \
	  $(BIN)/pytest -q --capture=sys tests/ops/test_operators.py \
	    $$(test "$$isa" || echo tests/ops/test_sweep.py) -k cpu || exit; \
	done

# On a machine with a GPU. cuBLAS needs the variable under the determinism that poisons outputs.
test-gpu: $(INSTALLED)
	CUBLAS_WORKSPACE_CONFIG=:4096:8 SKIPVIT_REQUIRE=$(REQUIRE_GPU) $(BIN)/pytest \
	  tests/ops/test_operators.py tests/backends/test_triton_gpu.py tests/backends/test_triton_aot.py \
	  tests/skipping/ways/test_gpu.py -k triton

bench-gpu: $(INSTALLED)
	$(BIN)/pytest benchmarks/ --device cuda --benchmark-only \
	  --summary-csv docs/results/operators_gpu.csv --models-report docs/results/models_gpu
	$(BIN)/pytest benchmarks/test_operator_speed.py --device cuda -s -k host_time

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
