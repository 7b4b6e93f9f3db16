"""The settings reference lists every key and is up to date."""

import pytest

from docs.settings import PAGE, page
from icae_fast.training.loop.settings import DataSection, ModelSection, Settings


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python -m docs.settings`"


@pytest.mark.parametrize("section", [Settings, ModelSection, DataSection])
def test_every_key_has_a_row(section):
    for name in section.model_fields:
        assert f"| `{name}` |" in page() or f"## `{name}`" in page()


def test_a_row_says_type_default_and_unit():
    assert "| `micro_batch_tokens` | integer | `8192` | tokens | Context and decoder tokens of one forward" in page()
    assert "| `eval` | text or mapping or list of (text or mapping) or null | `null` |  | Sources of held-out" in page()
    assert "| `output` | text | required |" in page()
