"""The baseline, the measuring tools and the latency table of `icae-fast bench latency`.

Nothing here needs pytest, and nothing imports `bench/` or `docs/`, which are in no wheel.
"""
