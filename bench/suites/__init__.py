"""The benchmark suites that pytest runs."""
