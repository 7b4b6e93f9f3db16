"""Every kept input of the fuzzers is read, or refused with a typed error; every seed is read."""

from __future__ import annotations

import pytest

from fuzz import CORPORA, seeds
from fuzz.targets import TARGETS, check

INPUTS = sorted(path for path in CORPORA.glob("*/*") if path.is_file())


def test_every_target_has_inputs():
    assert {path.parent.name for path in INPUTS} == set(TARGETS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", INPUTS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_kept_input(path, tmp_path):
    check(path.parent.name, path.read_bytes(), tmp_path)


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_read(name, tmp_path):
    (tmp_path / "between").mkdir()
    for i, data in enumerate(seeds.seeds(tmp_path / "between")[name]):
        place = tmp_path / str(i)
        place.mkdir()
        TARGETS[name](data, place)
