"""The same text is the same wherever it enters, and what is no text is refused in one sentence."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from icae_fast import MemoryStore
from icae_fast.cli.loading import read_text
from icae_fast.core.text import clean_text, decode_text, unified
from icae_fast.errors import InvalidInputError
from icae_fast.training.data.records import TEXT, read_records

TEXT_AS_IT_IS = "w5 w6\nw7\n\nw8"
FORMS = {
    "LF": TEXT_AS_IT_IS,
    "CRLF": TEXT_AS_IT_IS.replace("\n", "\r\n"),
    "CR": TEXT_AS_IT_IS.replace("\n", "\r"),
    "BOM": "\ufeff" + TEXT_AS_IT_IS,
    "BOM and CRLF": "\ufeff" + TEXT_AS_IT_IS.replace("\n", "\r\n"),
}
NO_TEXT = {
    "a\0b": r"holds a NUL character \(at line 1, character 2\), which is no text; remove it",
    "a\nb \udcff": r"is not UTF-8 \(the byte 0xff at line 2, character 3\); convert it to UTF-8",
    "a\ud83d": r"is not Unicode \(half a surrogate pair, U\+D83D, at line 1, character 2\); remove it",
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_text_is_the_same_from_every_entrance(form, tmp_path, make_icae, byte_tokenizer, make_base):
    icae = make_icae(base=make_base(vocab_size=320), tokenizer=byte_tokenizer)
    (tmp_path / "a.txt").write_bytes(form.encode())
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": form}))
    from_files = [r["text"] for r in read_records([str(tmp_path / "a.txt"), str(tmp_path / "a.jsonl")], TEXT)]
    for text in (read_text(tmp_path / "a.txt"), *from_files):
        assert text == TEXT_AS_IT_IS
    with MemoryStore(tmp_path / "store", icae) as store:
        assert store.key_of(form) == store.key_of(TEXT_AS_IT_IS)
    assert icae.prompt_ids(form) == icae.prompt_ids(TEXT_AS_IT_IS)


@given(st.text(st.sampled_from("a\r\n\ufeff "), max_size=12))
def test_cleaning_twice_is_cleaning_once(text):
    clean = unified(text)
    assert unified(clean) == clean == clean_text(text, "it") == decode_text(text.encode(), "it")
    assert "\r" not in clean
    assert clean.replace("\n", "") == text.lstrip("\ufeff").replace("\r", "").replace("\n", "")


@pytest.mark.parametrize(("text", "message"), NO_TEXT.items(), ids=["NUL", "argument", "surrogate"])
def test_what_is_no_text_is_refused(tiny_icae, make_icae, make_tokenizer, text, message):
    icae = make_icae(tokenizer=make_tokenizer())
    memory = icae.compress("w5 w6")[0]
    calls = {
        "context 1": lambda: icae.compress(["w5", text]),
        "the prompt": lambda: icae.generate(memory, text, 2),
        "the extension": lambda: icae.extend(memory, text),
    }
    for what, call in calls.items():
        with pytest.raises(InvalidInputError, match=f"^{what} {message}$"):
            call()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"ab\ncd \xff", r"cannot read {} as UTF-8 text \(the byte 0xff at line 2, byte 4\); convert"),
        ("ab".encode("utf-16"), r"cannot read {} as .* \(the byte 0xff at line 1, byte 1; it looks like UTF-16\)"),
        (b"ab\n\0", r"{} holds a NUL character \(at line 2, character 1\)"),
    ],
)
def test_a_file_that_is_no_text_is_refused_with_its_place(tmp_path, content, message):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(InvalidInputError, match=message.format(path)) as refused:
        read_text(path)
    (record,) = read_records([str(path)], TEXT)
    assert (record["origin"], record["problem"]) == (str(path), str(refused.value).replace(str(path), "it"))


def test_rows_that_are_no_text_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\u0000b"}\n{"text": "\\ud83d"}\n{"text": "\\ufeff \\r\\n"}\n')
    problems = [(r["origin"], r["problem"]) for r in read_records([str(path)], TEXT)]
    assert problems == [
        (f"{path}:1", "field 'text' holds a NUL character"),
        (f"{path}:2", "field 'text' is not Unicode"),
        (f"{path}:3", "field 'text' is empty"),
    ]
