"""The tables of the README and of docs/kernels.md are what the specs and results say."""

from pathlib import Path

import pytest

from docs.tables import _encode, fill
from icae_fast.ops import REGISTRY

README = Path(__file__).parents[2] / "README.md"
KERNELS = README.parent / "docs" / "kernels.md"


@pytest.mark.parametrize("path", [README, KERNELS], ids=lambda p: p.name)
def test_tables_are_up_to_date(path):
    assert fill(path.read_text()) == path.read_text(), "run `make readme`"


def test_every_op_and_backend_has_a_row():
    text = README.read_text()
    for spec in REGISTRY.values():
        assert text.count(f"| `{spec.name}` |") == len(spec.dtypes)


def test_what_was_not_timed_is_a_dash():
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
