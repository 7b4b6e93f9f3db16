"""Incremental detokenization: whole characters, returned as soon as they are final, and cut at stop strings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from icae_fast.generation.detokenize import IncrementalText, StoppableText

HALF = "\ufffd"
ANY_IDS = st.lists(st.integers(0, 319), max_size=40)
TEXTS = st.text(st.sampled_from("thecasonm ,naïvefé日本語の文😀😃 aą\n\x00🏴‍☠️e\u0301"), max_size=30)


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True)


def pieces_of(text, ids):
    return [*(text.push(i) for i in ids), text.finish()]


@given(ids=ANY_IDS)
def test_pieces_of_random_ids_join_to_the_decoded_text(byte_tokenizer, ids):
    assert "".join(pieces_of(IncrementalText(byte_tokenizer), ids)) == decode(byte_tokenizer, ids)


@pytest.mark.parametrize("name", ["byte_tokenizer", "fallback_tokenizer"])
@given(words=st.lists(TEXTS, max_size=4))
def test_pieces_are_whole_characters_and_come_without_delay(request, name, words):
    """Put a special token behind each word; it must neither show up nor change other text."""
    tokenizer = request.getfixturevalue(name)
    ids = [i for word in words for i in (*tokenizer(word, add_special_tokens=False)["input_ids"], 2)]
    text, so_far, certain = IncrementalText(tokenizer), "", ""
    for n, token in enumerate(ids, 1):
        piece = text.push(token)
        assert HALF not in piece
        so_far += piece
        known = decode(tokenizer, ids[:n]).rstrip(HALF)
        certain = known if len(known) > len(certain) else certain  # byte fallback may withdraw text
        assert so_far == certain
    assert text.finish() == ""
    assert so_far == decode(tokenizer, ids)


@given(ids=st.lists(st.integers(0, 2) | st.integers(131, 271), max_size=30))
def test_invalid_bytes_withdraw_no_text_under_byte_fallback(fallback_tokenizer, ids):
    """Mix words with bytes from 0x80 on: no word or space is lost, and valid rows equal their decoded text."""
    whole, text = decode(fallback_tokenizer, ids), "".join(pieces_of(IncrementalText(fallback_tokenizer), ids))
    if HALF not in whole:
        assert text == whole
    letters = [c for c in whole if c in "abcdefghij "]
    assert [c for c in text if c in "abcdefghij "] == letters


def test_a_valid_character_stays_when_an_invalid_byte_follows(fallback_tokenizer):
    euro = fallback_tokenizer.convert_tokens_to_ids(["<0xE2>", "<0x82>", "<0xAC>"])
    bad = fallback_tokenizer.convert_tokens_to_ids("<0xFF>")
    assert decode(fallback_tokenizer, [*euro, bad]) == HALF * 4
    assert pieces_of(IncrementalText(fallback_tokenizer), [*euro, bad]) == ["", "", "€", "", HALF]


def cut(tokenizer, ids, stop_strings):
    """Return the whole characters before the first stop string and the number of tokens up to it (None without one).

    This is the definition: it decodes ever longer prefixes of the row until one holds a stop string.
    """
    for n in range(1, len(ids) + 1):
        text = decode(tokenizer, ids[:n]).rstrip(HALF)
        if places := [text.index(s) for s in stop_strings if s in text]:
            return text[: min(places)].rstrip(HALF), n
    return decode(tokenizer, ids), None


@given(data=st.data(), ids=ANY_IDS | TEXTS, extra=st.lists(st.text(min_size=1, max_size=3), max_size=2))
def test_text_is_cut_where_the_first_stop_string_begins(byte_tokenizer, data, ids, extra):
    if isinstance(ids, str):
        ids = byte_tokenizer(ids)["input_ids"]
    whole = decode(byte_tokenizer, ids)
    stops = [s for s in extra if HALF not in s]
    for _ in range(data.draw(st.integers(0, 2))):
        start = data.draw(st.integers(0, max(0, len(whole) - 1)))
        stops.append(whole[start : start + data.draw(st.integers(1, 5))])
    stops = [s for s in stops if s and HALF not in s]
    expected, n_tokens = cut(byte_tokenizer, ids, stops)
    text, shown, used = StoppableText(byte_tokenizer, stops), "", None
    for n, token in enumerate(ids, 1):
        shown += text.push(token)
        assert expected.startswith(shown)  # no part of a stop string is ever shown
        if text.stopped:
            used = n
            break
    shown += text.finish()
    assert (shown, used) == (expected, n_tokens)
    assert text.text == shown
    assert text.stopped == (n_tokens is not None)


def test_a_stop_string_that_spans_tokens_is_held_back(byte_tokenizer):
    text = StoppableText(byte_tokenizer, ["\n\nQ:"])
    ids = [i for part in ("a", "\n", "\n", "b", "\n", "\n", "Q", ": never") for i in byte_tokenizer(part)["input_ids"]]
    pieces = [text.push(i) for i in ids[:7]]
    assert pieces == ["a", "", "", "\n\nb", "", "", ""]
    assert not text.stopped
    assert (text.push(ids[7]), text.stopped, text.finish(), text.text) == ("", True, "", "a\n\nb")


def test_finish_returns_held_text_when_no_stop_string_came(byte_tokenizer):
    text = StoppableText(byte_tokenizer, ["xyz"])
    assert [text.push(i) for i in byte_tokenizer("x")["input_ids"]] == [""]
    assert (text.finish(), text.text, text.stopped) == ("x", "x", False)


COMBINED = "ab e\u0301\u0300\u0302o\u0351\u036b\u0489日\u200d😀"


@pytest.mark.parametrize("name", ["byte_tokenizer", "fallback_tokenizer"])
@given(data=st.data(), words=st.lists(st.text(st.sampled_from(COMBINED), min_size=1, max_size=5), max_size=4))
def test_a_text_that_is_cut_ends_with_a_whole_character(request, name, data, words):
    """Weave half characters between words, and stop at a part of a word: the half ones before it are not shown."""
    tokenizer, ids = request.getfixturevalue(name), []
    halves = [tokenizer("日", add_special_tokens=False)["input_ids"][-3:][:n] for n in (0, 1, 2)]
    for word in words:
        ids += data.draw(st.sampled_from(halves)) + tokenizer(word, add_special_tokens=False)["input_ids"]
    word = data.draw(st.sampled_from(words or ["a"]))
    start = data.draw(st.integers(0, len(word) - 1))
    text = StoppableText(tokenizer, [word[start : start + data.draw(st.integers(1, 4))]])
    pieces = []
    for token in ids:
        pieces.append(text.push(token))
        if text.stopped:
            assert not "".join(pieces).endswith(HALF)
            break
    pieces.append(text.finish())
    assert "".join(pieces) == text.text
