"""Glue between pytest-benchmark and `bench.harness.compare`.

pytest bench                              the real sizes; writes docs/results/SUITE-MACHINE.json
pytest bench --workload big               more and larger ones
pytest bench --benchmark-disable          each benchmark once, checked and untimed, at small sizes
pytest bench/suites/bench_encode.py -k 4x512     some of them; nothing is written
pytest bench/suites/bench_encode*.py             the suite of compressing; targets stand at the end
pytest bench/suites/bench_decode*.py             the suite of answering, likewise
pytest bench/suites/bench_train*.py              the suite of training, likewise
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench.harness.compare import Compare, write_results
from bench.harness.shapes import (
    ATTENTION_WORKLOADS,
    DECODE_WORKLOADS,
    ENCODE_WORKLOADS,
    FIRST_TOKEN_WORKLOADS,
    GROWTH_WORKLOADS,
    OVERFIT_WORKLOADS,
    QUESTION_WORKLOADS,
    SHAPE_WORKLOADS,
    STEP_MEMORY_WORKLOADS,
    TRAIN_WORKLOADS,
    WORKLOADS,
)
from bench.harness.targets import render
from icae_fast.benchmark.machine import REPOSITORY, Bounds, describe_machine

ROWS = pytest.StashKey[list]()


def pytest_addoption(parser):
    group = parser.getgroup("bench")
    group.addoption("--workload", choices=sorted(WORKLOADS), help="Sizes; real, or small with --benchmark-disable.")
    group.addoption(
        "--results", type=Path, default=REPOSITORY / "docs" / "results", help="Folder for the JSON results."
    )


def pytest_configure(config):
    config.addinivalue_line("python_files", "bench_*.py")
    # Inductor would write into the system's temporary folder, and compile again after a restart.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(REPOSITORY / ".cache" / "inductor"))


def pytest_terminal_summary(terminalreporter, config):
    """The measured figures beside the targets."""
    rows = config.stash.get(ROWS, [])
    if rows and (table := render(describe_machine(), rows)):
        terminalreporter.section("targets")
        terminalreporter.write_line(table)


def pytest_generate_tests(metafunc):
    """Some arguments stand for each case of the chosen workload."""
    disabled = metafunc.config.getoption("benchmark_disable")
    workload = metafunc.config.getoption("--workload") or ("small" if disabled else "real")
    arguments = {
        "case": WORKLOADS[workload],
        "encode_case": ENCODE_WORKLOADS[workload],
        "shape_case": SHAPE_WORKLOADS[workload],
        "rows": ATTENTION_WORKLOADS[workload],
        "decode_case": DECODE_WORKLOADS[workload],
        "question_case": QUESTION_WORKLOADS[workload],
        "first_token_case": FIRST_TOKEN_WORKLOADS[workload],
        "train_case": TRAIN_WORKLOADS[workload],
        "overfit_case": OVERFIT_WORKLOADS[workload],
    }
    for argument, chosen in arguments.items():
        if argument in metafunc.fixturenames:  # session scope makes pytest run all that needs one model in a row
            metafunc.parametrize(argument, chosen, ids=[c.name for c in chosen], scope="session")
    for argument, workloads in (("growing", GROWTH_WORKLOADS), ("lengthening", STEP_MEMORY_WORKLOADS)):
        if argument in metafunc.fixturenames:
            chosen = workloads[workload]
            metafunc.parametrize(argument, chosen, ids=[cases[-1].name for cases in chosen], scope="session")


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
    """Outcomes of each file; written at the end of a timed run in which every benchmark took part and passed."""
    files: dict[Path, list] = {}
    yield files
    config, collected = request.config, {item.path for item in request.session.items}
    partial = (
        config.option.keyword
        or config.option.markexpr
        or any("::" in a for a in config.args)
        or request.session.testsfailed
    )
    if config.getoption("benchmark_disable"):
        return
    config.stash[ROWS] = [outcome.row(bounds) for found in files.values() for outcome in found]
    for suite in {} if partial else dict.fromkeys(map(suite_of, files)):
        # A suite may lie in several files, `bench_SUITE.py` and `bench_SUITE_*.py`; without one it is not whole.
        members = [path for path in files if suite_of(path) == suite]
        neighbours = {path for path in members[0].parent.glob("bench_*.py") if suite_of(path) == suite}
        if neighbours <= collected:
            found = [outcome for path in members for outcome in files[path]]
            path = write_results(config.getoption("--results"), suite, machine, bounds, found)
            config.get_terminal_writer().line(f"\nwrote {path.name}")


def suite_of(path: Path) -> str:
    """The suite that a file of benchmarks belongs to: "encode" for `bench_encode_shapes.py`."""
    return path.stem.split("_")[1]


@pytest.fixture
def compare(request, benchmark, machine, bounds, outcomes):
    """A `bench.harness.compare.Compare` for one benchmark; see there."""
    limits = [request.config.getoption(f"benchmark_{name}") for name in ("min_rounds", "max_time")]
    comparison = Compare(benchmark, bounds, machine, limits[0], float(limits[1]))
    yield comparison
    if comparison.outcome is not None:
        outcomes.setdefault(request.path, []).append(comparison.outcome)
