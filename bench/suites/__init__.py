"""The pytest-benchmark suites."""
