"""Options and fixtures that connect pytest-benchmark with `bench.harness.compare`.

pytest bench                                   real sizes; writes docs/results/SUITE-MACHINE.json
pytest bench --workload big                    more and larger sizes
pytest bench --benchmark-disable               every benchmark once, checked but not timed, at small sizes
pytest bench/suites/bench_encode.py -k 4x512   a selection; writes nothing
pytest bench/suites/bench_encode*.py           compressing; prints the figures next to their targets
pytest bench/suites/bench_decode*.py           answering, likewise
pytest bench/suites/bench_train*.py            training, likewise
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.harness.compare import RESULTS, Compare, write_results
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
from icae_fast.benchmark.measure import rounded

ROWS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--workload` and `--results`."""
    group = parser.getgroup("bench")
    group.addoption(
        "--workload", choices=sorted(WORKLOADS), help="Sizes (default: real, or small with --benchmark-disable)."
    )
    group.addoption("--results", type=Path, default=RESULTS, help="Folder for the JSON results.")


def pytest_configure(config: pytest.Config) -> None:
    """Collect `bench_*.py`, and keep inductor's cache in the repository."""
    config.addinivalue_line("python_files", "bench_*.py")
    # By default inductor writes into the system's temporary folder and compiles again after a restart.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(REPOSITORY / ".cache" / "inductor"))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the measured figures next to their targets."""
    rows = config.stash.get(ROWS, [])
    if rows and (table := render(describe_machine(), rows)):
        terminalreporter.section("targets")
        terminalreporter.write_line(table)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise the arguments that stand for a case with all cases of the chosen workload."""
    disabled = metafunc.config.getoption("benchmark_disable")
    workload = metafunc.config.getoption("--workload") or ("small" if disabled else "real")
    arguments: dict[str, Sequence[Any]] = {
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
        if argument in metafunc.fixturenames:  # with session scope, pytest runs all cases of one model in a row
            metafunc.parametrize(argument, chosen, ids=[c.name for c in chosen], scope="session")
    for argument, workloads in (("growing", GROWTH_WORKLOADS), ("lengthening", STEP_MEMORY_WORKLOADS)):
        if argument in metafunc.fixturenames:
            chosen = workloads[workload]
            metafunc.parametrize(argument, chosen, ids=[cases[-1].name for cases in chosen], scope="session")


@pytest.fixture(scope="session")
def machine() -> dict[str, Any]:
    """Return the machine, versions and commit of this run."""
    return describe_machine()


@pytest.fixture(scope="session")
def bounds() -> Bounds:
    """Return the bounds, which every comparison measures again before and after its timing."""
    return Bounds()


@pytest.fixture(scope="session")
def outcomes(
    request: pytest.FixtureRequest, machine: dict[str, Any], bounds: Bounds
) -> Iterator[dict[Path, list[Any]]]:
    """Yield the outcomes by file, and write every suite of which all benchmarks ran timed and passed."""
    files: dict[Path, list[Any]] = {}
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
        # A suite may have several files, `bench_SUITE.py` and `bench_SUITE_*.py`; all must have run.
        members = [path for path in files if suite_of(path) == suite]
        neighbours = {path for path in members[0].parent.glob("bench_*.py") if suite_of(path) == suite}
        if neighbours <= collected:
            rows = [rounded(outcome.row(bounds)) for path in members for outcome in files[path]]
            path = write_results(suite, machine, rows, config.getoption("--results"), bounds=bounds.as_dict())
            config.get_terminal_writer().line(f"\nwrote {path.name}")


def suite_of(path: Path) -> str:
    """Return the suite of a benchmark file, e.g. "encode" for `bench_encode_shapes.py`."""
    return path.stem.split("_")[1]


@pytest.fixture
def compare(
    request: pytest.FixtureRequest,
    benchmark: Any,
    machine: dict[str, Any],
    bounds: Bounds,
    outcomes: dict[Path, list[Any]],
) -> Iterator[Compare]:
    """Yield the `Compare` of one benchmark and collect its outcome."""
    limits = [request.config.getoption(f"benchmark_{name}") for name in ("min_rounds", "max_time")]
    comparison = Compare(benchmark, bounds, machine, limits[0], float(limits[1]))
    yield comparison
    if comparison.outcome is not None:
        outcomes.setdefault(request.path, []).append(comparison.outcome)
