"""Benchmarks, run from a checkout.

* `harness`: shapes and workloads, providers, comparisons and targets.
* `suites`: the pytest-benchmark suites, `bench_*.py`.
* `kernels`: Triton kernels compiled for absent GPUs, and a cost model of them.
* `gpu`: checks and timings on an NVIDIA GPU.
* `quality`: accuracy of slots.
* `rivals`: other systems.

The baseline, the timing tools and the latency table are in `icae_fast.benchmark`, because `icae-fast bench latency`
needs them too.
"""
