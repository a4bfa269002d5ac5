# `make demo` and `make test` set up everything they need in .venv; see README.md.
PYTHON ?= python3
VENV ?= .venv
# What pip installs torch from; a CPU-only build is enough for everything but the GPU targets.
TORCH ?= torch torchvision

# What the GPU targets run on, DEVICE=cpu to rehearse them, and where they write to. REQUIRE_GPU=
# shows that test-gpu starts on a machine without a GPU: it skips, and says so.
DEVICE ?= cuda
RESULTS ?= docs/results
REQUIRE_GPU ?= $(if $(filter cuda,$(DEVICE)),triton,$(DEVICE))

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# The Pythons that get a wheel.
PYTHONS ?= $(foreach minor,10 11 12 13 14,\
  $(shell python3.$(minor) -c "import sys; print(sys.executable)" 2>/dev/null))
SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*)
CXX_FILES := $(wildcard csrc/*.cpp csrc/*.h ascend_ops/*.cpp ascend_ops/*.h ascend_ops/*/*.cpp \
  ascend_ops/*/*.h tests/ascend/*.cpp tests/ascend/*.h tests/ptx/*.cpp)

.PHONY: demo test test-cpu test-interpreter test-ptx test-sanitizers test-gpu lint bench \
  bench-gpu bench-gpu-operators bench-gpu-models bench-gpu-compiled gpu-kit dist clean

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

# On a machine with a GPU; docs/gpu.md says how on one without a network. cuBLAS needs the variable
# under the determinism that poisons outputs.
test-gpu: $(INSTALLED)
	CUBLAS_WORKSPACE_CONFIG=:4096:8 SKIPVIT_REQUIRE=$(REQUIRE_GPU) $(BIN)/pytest \
	  tests/ops/test_operators.py tests/backends/test_triton_gpu.py tests/skipping/ways/test_gpu.py \
	  -k "$(if $(filter cuda,$(DEVICE)),triton,$(DEVICE)) or gpu"

# What compiling the chains takes is left to the end: minutes that a short run would miss elsewhere.
bench-gpu: bench-gpu-operators bench-gpu-models bench-gpu-compiled

bench-gpu-operators: $(INSTALLED)
	$(BIN)/pytest benchmarks/test_operator_speed.py --device $(DEVICE) --benchmark-only \
	  -k "not compiled" --summary-csv $(RESULTS)/operators_gpu.csv
	$(BIN)/pytest benchmarks/test_operator_speed.py --device $(DEVICE) -s -k host_time

bench-gpu-models: $(INSTALLED)
	$(BIN)/pytest benchmarks/test_model_speed.py --device $(DEVICE) --benchmark-only \
	  --models-report $(RESULTS)/models_gpu

bench-gpu-compiled: $(INSTALLED)
	$(BIN)/pytest benchmarks/test_operator_speed.py --device $(DEVICE) --benchmark-only \
	  -k "not naive and not best" --summary-csv $(RESULTS)/operators_gpu_compiled.csv

gpu-kit: $(INSTALLED)
	$(BIN)/python tools/gpu_kit.py $(KIT)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

bench: $(INSTALLED)
	$(BIN)/pytest benchmarks/ --benchmark-only

dist: $(INSTALLED)
	tools/dist.sh $(VENV) "$(TORCH)" $(PYTHONS)

# Without build isolation the kernels are built against the torch that runs them, and pip does not
# download torch a second time.
$(INSTALLED): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH) "setuptools>=77" "cmake>=3.24" ninja "pybind11>=2.13"
	SKIPVIT_BUILD_CPP=1 $(BIN)/pip install --quiet --no-build-isolation --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info skipvit_kernels/_C*.so demo_results
