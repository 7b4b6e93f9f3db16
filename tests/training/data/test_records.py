"""Readers of data files: every format and compression, damage with its place, and bombs that stay on the disk."""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import re
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from icae_fast.errors import ConfigError, DataError
from icae_fast.training.data import opening
from icae_fast.training.data.records import PWC, TEXT, find_files, read_records, usable_records
from icae_fast.training.data.sources import SourceSpec, open_source

ROWS = [{"text": f"line {i}"} for i in range(3000)]
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


def zstd(data):
    return pa.compress(data, codec="zstd", asbytes=True)


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def text_column(values, name="text"):
    """Return a Parquet file of a text column, whose values are bytes that nobody has checked."""
    offsets = [0]
    for value in values:
        offsets.append(offsets[-1] + len(value))
    buffers = [None, pa.array(offsets, pa.int32()).buffers()[1], pa.py_buffer(b"".join(values))]
    column = pa.Array.from_buffers(pa.string(), len(values), buffers)
    out = io.BytesIO()
    pq.write_table(pa.table({name: column}), out)
    return out.getvalue()


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write_(name, content):
        (tmp_path / name).write_bytes(content)
        return name

    return write_


def read(name, fields=TEXT, **options):
    return [(r["origin"], r["text"], r["problem"]) for r in read_records(find_files(name), fields, **options)]


@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".json"])
@pytest.mark.parametrize("suffix", ["", *COMPRESS])
def test_lines_of_json(write, kind, suffix):
    name = write(f"rows{kind}{suffix}", COMPRESS[suffix](LINES) if suffix else LINES)
    assert read(name) == [(f"{name}:{i}", row["text"], "") for i, row in enumerate(ROWS, 1)]


def test_a_compressed_name_in_capitals(write):
    assert len(read(write("ROWS.JSONL.GZ", gzip.compress(LINES)))) == len(ROWS)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_several_frames(write, suffix):
    """Tools that compress in parallel, and `cat`, write one frame behind the other."""
    compress = COMPRESS[suffix]
    frames = compress(LINES[:20001]) + compress(LINES[20001:40000]) + compress(LINES[40000:])
    assert [text for _, text, _ in read(write(f"rows.jsonl{suffix}", frames))] == [row["text"] for row in ROWS]


def test_a_zstd_frame_of_another_program(write):
    """With the content's size, and behind a frame to skip, as `zstd` and `pzstd` write them."""
    raw = b'{"text": "abc"}\n'
    block = bytes([len(raw) << 3 & 0xFF | 1, len(raw) >> 5, 0])  # the last block, uncompressed
    frame = b"\x28\xb5\x2f\xfd" + bytes([0x20, len(raw)]) + block + raw
    skipped = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    assert read(write("a.jsonl.zst", skipped + frame)) == [("a.jsonl.zst:1", "abc", "")]


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".txt"])
@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_file_that_is_cut_is_never_whole(write, kind, suffix):
    whole = COMPRESS[suffix](LINES)
    frame = COMPRESS[suffix](b"x")
    for cut in (whole[:-1], whole[: len(whole) // 2], whole[:3], b"", whole + frame[: len(frame) // 2]):
        name = write(f"cut{kind}{suffix}", cut)
        with pytest.raises(DataError, match=rf"{name} (beyond|is empty)"):
            read(name)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_damage_names_file_and_line(write, suffix):
    """The error names the last line that could be read."""
    name = write(f"rows.jsonl{suffix}", COMPRESS[suffix](LINES) + COMPRESS[suffix](LINES)[:20])
    with pytest.raises(DataError, match=rf"cannot read {name} beyond {name}:\d+: .*; replace the file") as caught:
        read(name)
    line = int(re.search(r":(\d+): ", str(caught.value))[1])
    assert 3000 - opening._READ // 20 <= line <= 3000
    garbage = write(f"garbage.jsonl{suffix}", b"hello")
    with pytest.raises(DataError, match=f"cannot read {garbage} beyond {garbage}"):
        read(garbage)


def test_a_column_that_is_not_utf8(write):
    name = write("rows.parquet", text_column([b"one", b"tw\xffo", b"three", b"\xed\xa0\x80"]))
    assert read(name) == [
        (f"{name}:row 0", "one", ""), (f"{name}:row 1", "", "not UTF-8"), (f"{name}:row 2", "three", ""),
        (f"{name}:row 3", "", "not UTF-8"),
    ]  # fmt: skip
    with pytest.raises(DataError, match="have no usable text: 1 times not UTF-8"):
        usable_records([write("bad.parquet", text_column([b"\xff"]))], TEXT, "text")


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".txt"])
def test_a_row_of_a_bomb_is_not_read_to_its_end(write, monkeypatch, kind, suffix):
    monkeypatch.setattr(opening, "LARGEST_ROW", 8 << 20)
    taken = []
    content = b'{"text": "' + b"a" * (64 << 20)
    name = write(f"bomb{kind}{suffix}", COMPRESS[suffix](content) if suffix else content)
    opened = opening.open_data

    @contextlib.contextmanager
    def counted(path):
        with opened(path) as file:
            read_some = getattr(file, "read1", file.read)

            def read(size):
                taken.append(read_some(size))
                return taken[-1]

            yield SimpleNamespace(read=read)

    monkeypatch.setattr("icae_fast.training.data.records.open_data", counted)
    with pytest.raises(DataError, match=rf"bomb{kind}.* is longer than 8 MiB"):
        read(name)
    assert sum(map(len, taken)) <= (8 << 20) + opening._READ


def test_many_lines_may_be_larger_than_a_row(write, monkeypatch):
    monkeypatch.setattr(opening, "LARGEST_ROW", 1000)
    monkeypatch.setattr(opening, "_READ", 64)
    assert len(read(write("rows.jsonl", LINES))) == len(ROWS)
    name = write("long.jsonl", LINES + json.dumps({"text": "a" * 1100}).encode())
    with pytest.raises(DataError, match=f"{name}:3001 is longer than"):
        read(name)


def test_any_field_holds_the_text(write):
    rows = [{"content": "a"}, {"text": "b"}, {"content": ""}]
    name = write("rows.json", b"\n".join(json.dumps(row).encode() for row in rows))
    assert read(name, text_field="content") == [
        (f"{name}:1", "a", ""), (f"{name}:2", "", "no field 'content'"), (f"{name}:3", "", "field 'content' is empty"),
    ]  # fmt: skip
    table = write("rows.parquet", text_column([b"a", b"b"], name="content"))
    assert [text for _, text, _ in read(table, text_field="content")] == ["a", "b"]
    assert [text for _, text, _ in read(write("a.txt", b"plain"), text_field="content")] == ["plain"]
    with pytest.raises(DataError, match=r"has no column text; it has content, and rows need text; name the field"):
        read(table)
    with pytest.raises(DataError, match=r"1 times no field 'text'; name the field of the text \(--text-field"):
        usable_records([write("other.jsonl", b'{"body": "a"}')], TEXT, "text")
    with pytest.raises(DataError, match=r"no field 'answer'$"):
        usable_records([write("pwc.jsonl", b'{"input": "a", "prompt": "b"}')], PWC, "rows")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_source_with_another_field(write, make_tokenizer, streaming):
    name = write("rows.jsonl", b'{"content": "w5 w6"}\n{"content": "w7", "text": "w9"}\n')
    spec = {"path": name, "text_field": "content", "streaming": streaming}
    rows = open_source(spec, make_tokenizer(), cache_folder="cache").rows(0)
    assert sorted(row.ids[0].tolist() for row in rows) == [[5, 6], [7]]
    rows = open_source(spec | {"text_field": "text"}, make_tokenizer(), cache_folder="cache").rows(0)
    assert [row.ids[0].tolist() for row in rows if not row.problem] == [[9]]
    with pytest.raises(ConfigError, match="text_field is None; it must be str"):
        SourceSpec.make({"path": name, "text_field": None})
