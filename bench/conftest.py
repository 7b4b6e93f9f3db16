"""Glue between pytest-benchmark and `bench.harness`.

pytest bench                              the real sizes; writes docs/results/SUITE-MACHINE.json
pytest bench --workload big               more and larger ones
pytest bench --benchmark-disable          each benchmark once, checked and untimed, at small sizes
pytest bench/bench_encode.py -k 4x512     some of them; nothing is written
"""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.harness import Compare, write_results
from bench.machine import REPOSITORY, Bounds, describe_machine
from bench.shapes import WORKLOADS


def pytest_addoption(parser):
    group = parser.getgroup("bench")
    group.addoption("--workload", choices=sorted(WORKLOADS), help="Sizes; real, or small with --benchmark-disable.")
    group.addoption(
        "--results", type=Path, default=REPOSITORY / "docs" / "results", help="Folder for the JSON results."
    )


def pytest_configure(config):
    config.addinivalue_line("python_files", "bench_*.py")


def pytest_generate_tests(metafunc):
    """An argument `case` stands for each case of the chosen workload, `one_document` for those with one document."""
    disabled = metafunc.config.getoption("benchmark_disable")
    cases = WORKLOADS[metafunc.config.getoption("--workload") or ("small" if disabled else "real")]
    for argument, chosen in (("case", cases), ("one_document", [c for c in cases if c.documents == 1])):
        if argument in metafunc.fixturenames:  # session scope makes pytest run all that needs one model in a row
            metafunc.parametrize(argument, chosen, ids=[c.name for c in chosen], scope="session")


@pytest.fixture(scope="session")
def machine():
    """What the run is on."""
    return describe_machine()


@pytest.fixture(scope="session")
def bounds():
    """The bounds, measured before and after every comparison."""
    return Bounds()


@pytest.fixture(scope="session")
def outcomes(request, machine, bounds):
    """Outcomes of each suite; written at the end of a timed run in which every benchmark took part and passed."""
    suites: dict[str, list] = {}
    yield suites
    config = request.config
    partial = (
        config.option.keyword
        or config.option.markexpr
        or any("::" in a for a in config.args)
        or request.session.testsfailed
    )
    if config.getoption("benchmark_disable") or partial:
        return
    for suite, found in suites.items():
        path = write_results(config.getoption("--results"), suite, machine, bounds, found)
        config.get_terminal_writer().line(f"\nwrote {path.name}")


@pytest.fixture
def compare(request, benchmark, machine, bounds, outcomes):
    """A `bench.harness.Compare` for one benchmark; see there."""
    limits = [request.config.getoption(f"benchmark_{name}") for name in ("min_rounds", "max_time")]
    comparison = Compare(benchmark, bounds, machine, limits[0], float(limits[1]))
    yield comparison
    if comparison.outcome is not None:
        outcomes.setdefault(request.path.stem.removeprefix("bench_"), []).append(comparison.outcome)
