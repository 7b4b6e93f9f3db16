"""The README's tables are what the specs and results say."""

from pathlib import Path

from docs.tables import fill
from icae_fast.ops import REGISTRY

README = Path(__file__).parent.parent / "README.md"


def test_the_readme_is_up_to_date():
    assert fill(README.read_text()) == README.read_text(), "run `make readme`"


def test_every_op_and_backend_has_a_row():
    text = README.read_text()
    for spec in REGISTRY.values():
        assert text.count(f"| `{spec.name}` |") == len(spec.dtypes)
