"""The README's plot is drawn from the newest published figures."""

import json

import pytest

pytest.importorskip("matplotlib", reason="plots need matplotlib")

from docs.overview import OVERVIEW, TASKS, comparisons, draw_overview, newest_results
from docs.tables import RESULTS


def test_bars_are_the_published_ratios():
    bars = comparisons()
    assert [task for task in TASKS if task not in {bar.task for bar in bars}] == []
    for bar in (b for b in bars if b.task == "first token, KV"):
        found = [
            row["first_token_speedup"]["icae_fast KV tier"]["median"]
            for path in RESULTS.glob("decode-*.json")
            for row in json.loads(path.read_text())["rows"]
            if "first_token_speedup" in row
        ]
        assert bar.ratio in found
        assert bar.baseline.endswith(" s")


def test_the_newest_results_of_a_cpu_win(tmp_path):
    for name, date in (("a", "2026-01-02"), ("b", "2026-01-03"), ("c", "2026-01-01")):
        content = {"machine": {"cpu": "one", "threads": 2, "date": date}, "rows": [{"name": name}]}
        (tmp_path / f"encode-{name}.json").write_text(json.dumps(content))
    assert newest_results(tmp_path)["one"]["encode"]["rows"] == [{"name": "b"}]


def test_the_plot_is_up_to_date_and_drawn_for_both_themes(tmp_path):
    written = draw_overview(comparisons(), tmp_path / OVERVIEW.name)
    assert [path.name for path in written] == ["overview.svg", "overview-dark.svg"]
    assert "#0d1117" in written[1].read_text()
    assert all((RESULTS / path.name).is_file() for path in written), "run `make readme`"
