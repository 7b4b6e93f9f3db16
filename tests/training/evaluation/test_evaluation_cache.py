"""The cache of an evaluation: kept values, and recovery from kills and damage."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from icae_fast.errors import InvalidInputError, OutputError
from icae_fast.training.evaluation.cache import AnswerCache

JSON = st.recursive(
    st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=5,
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "answers.jsonl"


@given(values=st.dictionaries(st.text(), JSON, max_size=5))
def test_values_come_back(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("cache") / "answers.jsonl"
    with AnswerCache(path) as cache:
        for key, value in values.items():
            cache.put(key, value)
            assert cache.get(key) == value
    with AnswerCache(path) as cache:
        assert (len(cache), cache.damaged) == (len(values), 0)
        assert all(cache.get(key) == value for key, value in values.items())
        assert cache.get("no such key") is None


def fill(path):
    with AnswerCache(path) as cache:
        cache.put("a", [1, "é"])
        cache.put("b", {"text": "x"})
    return path.read_bytes()


def test_a_file_cut_off_at_any_byte_is_taken_up(path):
    whole = fill(path)
    first = whole.index(b"\n") + 1
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with AnswerCache(path) as cache:
            kept = (size >= first - 1) + (size >= len(whole) - 1)
            assert (len(cache), cache.damaged) == (kept, 0)
            cache.put("a", [1, "é"])
            cache.put("b", {"text": "x"})
        with AnswerCache(path) as cache:
            assert (cache.get("a"), cache.get("b")) == ([1, "é"], {"text": "x"})


def test_a_damaged_line_is_counted_and_its_value_made_again(path):
    whole = fill(path)
    for damage in (whole.replace(b'"x"', b'"y"'), b"\x00" * 20 + whole[whole.index(b"\n") :]):
        path.write_bytes(damage)
        lost, kept = ("b", "a") if damage.startswith(b"{") else ("a", "b")
        with AnswerCache(path) as cache:
            assert (cache.damaged, cache.get(lost)) == (1, None)
            assert cache.get(kept) is not None
            cache.put(lost, "again")
        with AnswerCache(path) as cache:
            assert (cache.damaged, cache.get(lost)) == (1, "again")


@pytest.mark.parametrize("content", ["precious text", '{"text": "a"}\n', "[1]\n[2]\n"])
def test_another_kind_of_file_is_left_as_it_is(path, content):
    path.write_text(content)
    with pytest.raises(InvalidInputError, match="holds no answers"):
        AnswerCache(path).__enter__()
    assert path.read_text() == content


def test_two_processes_do_not_share_a_file(path):
    with AnswerCache(path), pytest.raises(OutputError, match="another process"):
        AnswerCache(path).__enter__()
    assert not path.exists()  # nothing was put


def test_lines_are_json(path):
    fill(path)
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "b"]


@pytest.mark.parametrize("name", ["a" * 255, "é" * 127, "a" * 249, "a" * 250])
def test_a_name_of_the_greatest_length(tmp_path, name):
    path = tmp_path / name
    with AnswerCache(path) as cache:
        cache.put("key", 1)
        with pytest.raises(OutputError, match="another process is writing"), AnswerCache(path):
            pass
    with AnswerCache(path) as cache:
        assert cache.get("key") == 1
