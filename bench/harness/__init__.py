"""Shared parts of the benchmark suites: workloads, providers, comparisons and targets."""
