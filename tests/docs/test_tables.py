"""The tables on all pages agree with the op specs and the published results."""

from pathlib import Path

import pytest

from docs.tables import RESULTS, TABLES, _encode, fill
from icae_fast.ops import REGISTRY

ROOT = Path(__file__).parents[2]
PAGES = [
    path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if "<!-- table:" in path.read_text()
]
BENCHMARKS = ROOT / "docs" / "benchmarks.md"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_tables_are_up_to_date(path):
    assert fill(path.read_text(), path.parent) == path.read_text(), "run `make readme`"


def test_every_table_stands_on_a_page():
    text = "".join(path.read_text() for path in PAGES)
    assert [name for name in TABLES if f"<!-- table:{name} -->" not in text] == []


def test_links_to_results_are_relative_to_the_page(tmp_path):
    marked = "<!-- table:train -->\n<!-- end -->\n"
    assert "](docs/results/train-memory-" in fill(marked, ROOT)
    assert "](results/train-memory-" in fill(marked, ROOT / "docs")
    assert "](../results/train-memory-" in fill(marked, RESULTS.parent / "a folder")


def test_every_op_and_backend_has_a_row():
    text = BENCHMARKS.read_text()
    for spec in REGISTRY.values():
        assert text.count(f"| `{spec.name}` |") == len(spec.dtypes)


def test_missing_timings_are_dashes():
    ratio = {"median": 2.0, "min": 1.5, "max": 2.5, "of_minima": 2.0}
    rates = {"icae_fast": {"fraction_of_bound": 0.75}}
    over = {"baseline": ratio, "merged": ratio, "merged compiled": ratio | {"median": 1.5}}
    rows = [
        {"case": "a", "speedup_over": over, "time_over_gemms": ratio | {"median": 1.25}, "rates": rates},
        {"case": "b", "speedup_over": {"baseline": ratio}, "rates": rates},
        {"rows_by_tokens": "4x640", "speedup_over": {"sdpa": ratio}, "rates": rates},
        {"case": "c", "exponent": 1.0},
    ]
    machine = {"cpu": "AMD EPYC", "threads": 2, "isa": "avx512", "commit": "0" * 40}
    lines = _encode({"machine": machine, "rows": rows}).splitlines()
    assert lines[-2:] == ["| a | 2 | 1.5 | - | 1.25 | 75% |", "| b | 2 | - | - | - | 75% |"]
    assert lines[-3].count("|") == lines[-1].count("|")
