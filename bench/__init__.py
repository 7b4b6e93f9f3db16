"""Benchmarks: the baseline, the latency table, and pytest-benchmark suites (`bench_*.py`).

`icae_fast.benchmark.baseline` and `icae_fast.benchmark.latency` are also used by `icae-fast bench latency` and the
demo, so nothing that
they import needs pytest.
"""
