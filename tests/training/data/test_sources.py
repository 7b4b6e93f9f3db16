"""Sources of rows: every kind of file, provenance, tokenisation once, and messages about bad rows."""

import bz2
import gzip
import json
import os

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from icae_fast.errors import CacheError, ConfigError, DataError, TokenizerMismatchError
from icae_fast.training.data import tokenise
from icae_fast.training.data.records import PWC, TEXT, find_files, read_records
from icae_fast.training.data.sources import SourceSpec, open_source

BAD = [
    (b"{not json}", "not JSON"),
    (b'["a list"]', "not a JSON object"),
    (b'"text"', "not a JSON object"),
    (b'{"body": "w5"}', "no field 'text'"),
    (b'{"text": 5}', "field 'text' is not text"),
    (b'{"text": null}', "field 'text' is not text"),
    (b'{"text": ""}', "field 'text' is empty"),
    (b'{"text": " \\n "}', "field 'text' is empty"),
    (b'{"text": "w5 \xff"}', "not UTF-8"),
    (b'{"text": "\\ud83d"}', "field 'text' is not Unicode"),
    (b"[" * 100_000, "not JSON"),
    (b'{"text": "w5', "not JSON"),
]


def words(*numbers):
    return " ".join(f"w{n}" for n in numbers)


def lines(rows):
    return b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)


def listed(source, epoch=0):
    """Return [(origin, ids of the fields, problem)] in the order of their keys."""
    rows = sorted(source.rows(epoch), key=lambda row: [int(n) for n in row.key.split(":")])
    return [(row.origin, *(ids.tolist() for ids in row.ids), row.problem) for row in rows]


@pytest.fixture
def open_rows(make_tokenizer, tmp_path):
    def open_(specs, fields=TEXT, **options):
        return open_source(specs, make_tokenizer(), fields, cache_folder=str(tmp_path / "cache"), **options)

    return open_


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Return `write(name, rows or bytes)`, which writes a file into the current folder and returns its name."""
    monkeypatch.chdir(tmp_path)

    def write_(name, content):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else lines(content))
        return name

    return write_


def parquet(rows):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("streaming", [False, True])
def test_files_of_all_kinds(open_rows, write, streaming):
    write("rows/a.jsonl", b"\xef\xbb\xbf" + lines([{"text": words(5, 6), "source": 1}, b"\n", {"text": words(7)}]))
    write("rows/b.jsonl.gz", gzip.compress(lines([{"text": words(8)}])))
    write("rows/c.ndjson.bz2", bz2.compress(lines([{"text": words(9)}])))
    write("rows/d.parquet", parquet([{"text": words(10), "n": 1}, {"text": None, "n": 2}, {"text": words(11), "n": 3}]))
    write("rows/more/e.txt", words(12, 13).encode())
    write("rows/notes.md", b"not read")
    source = open_rows({"path": "rows", "streaming": streaming})
    rows = [
        ("rows/a.jsonl:1", [5, 6], ""),
        ("rows/a.jsonl:3", [7], ""),
        ("rows/b.jsonl.gz:1", [8], ""),
        ("rows/c.ndjson.bz2:1", [9], ""),
        ("rows/d.parquet:row 0", [10], ""),
        ("rows/d.parquet:row 2", [11], ""),
        ("rows/more/e.txt", [12, 13], ""),
    ]
    bad = ("rows/d.parquet:row 1", [], "field 'text' is not text")
    if streaming:
        assert listed(source) == [*rows[:5], bad, *rows[5:]]
    else:
        assert listed(source) == rows
        assert source.bad_rows == [(bad[0], bad[2])]
    assert len(listed(open_rows({"path": "rows/*.jsonl*", "streaming": streaming}))) == 3
    assert len(listed(open_rows([{"path": p, "streaming": streaming} for p in ("rows/a.jsonl", "rows/more")]))) == 3
    absolute = open_rows({"path": os.path.abspath("rows/**/*.txt"), "streaming": streaming})
    assert [row[0] for row in listed(absolute)] == [os.path.abspath("rows/more/e.txt")]


@pytest.mark.parametrize("streaming", [False, True])
def test_control_tokens_in_rows_are_text(write, byte_tokenizer, tmp_path, streaming):
    text = "the cat</s> sat\r\n"
    write(
        "a.jsonl",
        [{"input": text, "prompt": text, "answer": "<bos>naïve"}, {"input": "a", "prompt": "b", "answer": "c"}],
    )

    def opened(**options):
        spec, cache = {"path": "a.jsonl", "streaming": streaming}, str(tmp_path / "cache")
        return listed(open_source(spec, byte_tokenizer, PWC, cache_folder=cache, **options))[0][1:4]

    rows = opened()
    assert not {i for ids in rows for i in ids} & set(byte_tokenizer.all_special_ids)
    assert [byte_tokenizer.decode(ids) for ids in rows] == ["the cat</s> sat\n"] * 2 + ["<bos>naïve"]
    context, prompt, answer = opened(special_tokens="control")
    assert (context.count(2), prompt.count(2), answer[0]) == (1, 1, 1)
    assert opened() == rows


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_for_a_tokenizer_of_mistral_common(write, tmp_path, streaming):
    package = pytest.importorskip("mistral_common", reason="mistral-common is an optional package")
    from transformers.tokenization_mistral_common import MistralCommonBackend

    tokenizer = MistralCommonBackend(os.path.join(os.path.dirname(package.__file__), "data", "tekken_240911.json"))
    write("a.jsonl", [{"text": "hi [/INST] there"}])
    spec, cache = {"path": "a.jsonl", "streaming": streaming}, str(tmp_path / "cache")
    ((_, ids, problem),) = listed(open_source(spec, tokenizer, cache_folder=cache))
    assert (ids[0], problem) == (tokenizer.bos_token_id, "")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hi [/INST] there"


def test_remote_files():
    fs = fsspec.filesystem("memory")
    fs.pipe("/bucket/part-0.jsonl", lines([{"text": "w5"}]))
    fs.pipe("/bucket/part-1.jsonl", lines([{"text": "w6"}]))
    paths = find_files("memory://bucket/part-*.jsonl")
    assert [r["origin"] for r in read_records(paths, TEXT)] == [f"memory:///bucket/part-{i}.jsonl:1" for i in range(2)]
    fs.rm("/bucket", recursive=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_instructions(open_rows, write, make_tokenizer, streaming):
    row = {"input": words(5, 6), "prompt": words(7), "answer": words(8, 9)}
    write("pwc.jsonl", [row, row | {"answer": ""}, {"input": "w5", "answer": "w5"}, row])
    source = open_rows({"path": "pwc.jsonl", "streaming": streaming}, PWC)
    good = [r for r in listed(source) if not r[-1]]
    assert good == [(f"pwc.jsonl:{n}", [5, 6], [7], [8, 9], "") for n in (1, 4)]
    bad = [("pwc.jsonl:2", "field 'answer' is empty"), ("pwc.jsonl:3", "no field 'prompt'")]
    assert source.bad_rows == bad or [(r[0], r[-1]) for r in listed(source) if r[-1]] == bad
    with pytest.raises(DataError, match=r"notes.txt is plain text, and rows need input, prompt, answer"):
        listed(open_rows({"path": write("notes.txt", b"w5"), "streaming": streaming}, PWC))


def test_only_the_context_has_special_tokens(fallback_tokenizer, write, tmp_path):
    from tokenizers.processors import TemplateProcessing

    fallback_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    write("pwc.jsonl", [{"input": "ab", "prompt": "ab", "answer": "ab"}])
    source = open_source("pwc.jsonl", fallback_tokenizer, PWC, cache_folder=str(tmp_path / "cache"))
    (_, context, prompt, answer, _), *_ = listed(source)
    assert context == [1, *prompt]
    assert prompt == answer


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("line", "problem"), BAD, ids=range(len(BAD)))
def test_bad_rows_in_the_middle(open_rows, write, line, problem, streaming):
    write("rows.jsonl", [{"text": "w5"}, line + b"\n", {"text": "w6"}])
    spec = {"path": "rows.jsonl", "streaming": streaming}
    source = open_rows(spec)
    assert [r for r in listed(source) if not r[-1]] == [("rows.jsonl:1", [5], ""), ("rows.jsonl:3", [6], "")]
    assert ("rows.jsonl:2", problem) in [*source.bad_rows, *((r[0], r[-1]) for r in listed(source))]
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: {problem}; correct the row"):
        listed(open_rows(spec, on_bad_row="stop"))


def test_a_text_without_tokens(write, byte_tokenizer, tmp_path):
    from tokenizers import normalizers

    byte_tokenizer = byte_tokenizer.__class__(tokenizer_object=byte_tokenizer.backend_tokenizer)
    byte_tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    write("rows.jsonl", [{"text": "~~"}, {"text": "a"}])
    try:
        source = open_source("rows.jsonl", byte_tokenizer, cache_folder=str(tmp_path / "cache"))
    finally:
        byte_tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([])
    assert source.bad_rows == [("rows.jsonl:1", "field 'text' has no tokens")]


@pytest.mark.parametrize("streaming", [False, True])
def test_data_that_gives_nothing(open_rows, write, streaming):
    for name, content in (("empty.jsonl", b""), ("blank.jsonl", b"\n\n"), ("bad.jsonl", lines([{"text": ""}, b"{\n"]))):
        with pytest.raises(DataError, match="has no usable row"):
            listed(open_rows({"path": write(name, content), "streaming": streaming}))


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("missing.jsonl", "there is no missing.jsonl"),
        ("./missing", "there is no ./missing"),
        ("missing-*.jsonl", "nothing matches missing-"),
        ("folder", "no file of a known extension in folder"),
        ("table.csv", "table.csv has an unknown extension; known are .jsonl"),
        ("no/such-dataset", "no/such-dataset is not a file or folder, and could not be loaded"),
        ("file://nowhere/x.jsonl", "there is no file://nowhere/x.jsonl"),
        ("nosuch://bucket/x.jsonl", "cannot look for nosuch://"),
    ],
)
def test_paths_that_lead_nowhere(open_rows, write, path, said):
    write("folder/readme.md", b"")
    write("table.csv", b"")
    for streaming in (False, True):
        with pytest.raises(DataError, match=said):
            open_rows({"path": path, "streaming": streaming})


@pytest.mark.parametrize("streaming", [False, True])
def test_damaged_files(open_rows, write, streaming):
    whole = gzip.compress(lines([{"text": words(*range(3, 90))}] * 20000), mtime=0)
    for name, content in (
        ("cut.jsonl.gz", whole[: len(whole) // 2]),
        ("flipped.jsonl.gz", whole[:900] + bytes([whole[900] ^ 255]) + whole[901:]),
        ("plain.jsonl.gz", lines([{"text": "w5"}])),
        ("cut.parquet", parquet([{"text": "w5"}])[:-20]),
    ):
        with pytest.raises(DataError, match=f"cannot read {name} beyond {name}"):
            listed(open_rows({"path": write(name, content), "streaming": streaming}))
    write("other.parquet", parquet([{"body": "w5"}]))
    with pytest.raises(DataError, match=r"other.parquet has no column text; it has body"):
        listed(open_rows({"path": "other.parquet", "streaming": streaming}))


def test_rows_are_tokenised_once(open_rows, write, monkeypatch, make_tokenizer, tmp_path):
    write("rows.jsonl", [{"text": words(5, 6)}, {"text": words(7)}])
    calls, call = [], tokenise.Tokenise.__call__
    monkeypatch.setattr(tokenise.Tokenise, "__call__", lambda self, batch: (calls.append(1), call(self, batch))[1])
    first = listed(open_rows("rows.jsonl"))
    assert len(calls) == 1
    padded = make_tokenizer()
    padded(["w5", "w5 w6"], padding=True, truncation=True, max_length=1)  # changes options of the tokenizer permanently
    assert listed(open_source("rows.jsonl", padded, cache_folder=str(tmp_path / "cache"))) == first
    assert len(calls) == 1
    open_source("rows.jsonl", make_tokenizer(80), cache_folder=str(tmp_path / "cache"))
    assert len(calls) == 2
    os.utime("rows.jsonl", ns=(1, 1))
    assert listed(open_rows("rows.jsonl")) == first
    assert len(calls) == 3
    write("rows.jsonl", [{"text": words(9)}])
    assert listed(open_rows("rows.jsonl")) == [("rows.jsonl:1", [9], "")]


def test_an_error_leaves_no_cache_behind(open_rows, write, monkeypatch):
    write("rows.jsonl", [{"text": words(5)}])

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(datasets.arrow_writer.ArrowWriter, "write", full)
        with pytest.raises(CacheError, match=r"cannot write the tokenised rows into .*No space left"):
            open_rows("rows.jsonl")
    assert listed(open_rows("rows.jsonl")) == [("rows.jsonl:1", [5], "")]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for a data set of the hub: a Parquet file of three parts."""
    rows = [{"text": words(i), "other": i} for i in range(5, 14)]
    rows[4]["text"] = None
    files = []
    for i in range(3):
        files.append(str(tmp_path / f"hub-{i}.parquet"))
        (tmp_path / f"hub-{i}.parquet").write_bytes(parquet(rows[3 * i : 3 * i + 3]))
    asked, load = [], datasets.load_dataset

    def fake(path, config, *, split, revision, streaming):
        asked.append((path, config, split, revision, streaming))
        return load("parquet", data_files=files, split="train", streaming=streaming, cache_dir=str(tmp_path / "hub"))

    monkeypatch.setattr(datasets, "load_dataset", fake)
    return asked


def test_a_data_set_of_the_hub(open_rows, hub, tmp_path):
    spec = {"path": "someone/pile.v2", "config": "all", "split": "train", "revision": "abc"}
    source = open_rows(spec)
    assert listed(source) == [(f"someone/pile.v2[train]:{i}", [5 + i], "") for i in range(9) if i != 4]
    assert source.bad_rows == [("someone/pile.v2[train]:4", "field 'text' is not text")]
    assert hub == [("someone/pile.v2", "all", "train", "abc", False)]
    streamed = open_rows(spec | {"streaming": True})
    assert streamed.n_shards == 3
    name = "someone/pile.v2[train]:shard"
    assert listed(streamed) == [
        (f"{name} {i // 3}:{i % 3}", [] if i == 4 else [5 + i], "field 'text' is not text" if i == 4 else "")
        for i in range(9)
    ]
    with pytest.raises(DataError, match=r"someone/pile.v2\[train\] has no column input, prompt, answer; it has text"):
        open_rows(spec, PWC)
    with pytest.raises(ConfigError, match="read from files, which have no config and no revision"):
        open_rows({"path": str(tmp_path), "config": "all", "revision": "abc"})


@pytest.mark.parametrize("kind", ["mapped", "streamed", "hub"])
def test_an_order_for_each_epoch_and_a_place_in_it(open_rows, write, kind, request):
    if kind == "hub":
        request.getfixturevalue("hub")
    for i in range(4):
        write(f"rows/{i}.jsonl", [{"text": words(3 + 20 * i + j)} for j in range(5)])
    spec = {"path": "some/set" if kind == "hub" else "rows", "streaming": kind != "mapped"}
    source, other_seed = open_rows(spec), open_rows(spec, seed=1)
    orders = [[row.key for row in s.rows(epoch)] for s in (source, other_seed) for epoch in range(3)]
    assert len({tuple(sorted(order)) for order in orders}) == 1
    assert len({tuple(order) for order in orders}) > 2
    assert orders[:3] == [[row.key for row in open_rows(spec).rows(epoch)] for epoch in range(3)]
    rows = source.rows(2)
    states = [rows.state_dict()]
    for _ in rows:
        states.append(rows.state_dict())
    for i, state in enumerate(states):
        rows = open_rows(spec).rows(2)
        rows.load_state_dict(json.loads(json.dumps(state)))
        assert [row.key for row in rows] == orders[2][i:]
    write("rows/4.jsonl", [{"text": "w5"}])
    if kind != "hub":
        with pytest.raises(DataError, match="a run can only continue with the same data"):
            open_rows(spec).rows(2).load_state_dict(states[1])


def test_documents_are_visited_in_parts(open_rows, write):
    write("rows.jsonl", [{"text": words(*range(3, 53))}, {"text": "w7"}, {"text": words(*range(3, 23))}])
    source = open_rows("rows.jsonl", fragment_tokens=20)
    parts = sorted((row.origin, row.start, row.end, len(row.ids[0])) for row in source.rows(0))
    assert parts == [("rows.jsonl:1", 0, 16, 50), ("rows.jsonl:1", 16, 33, 50), ("rows.jsonl:1", 33, 50, 50),
                     ("rows.jsonl:2", 0, 1, 1), ("rows.jsonl:3", 0, 20, 20)]  # fmt: skip
    assert all(np.array_equal(row.ids[0], source[int(row.key)].ids[0]) for row in source.rows(0))
    assert len(source) == 5


def test_wrong_options_are_refused(open_rows, write):
    write("rows.jsonl", [{"text": "w5"}])
    for call, said in (
        (lambda: open_rows([]), "list of data sources is empty"),
        (lambda: open_rows("rows.jsonl", on_bad_row="ignore"), "on_bad_row is 'ignore'"),
        (lambda: open_rows("rows.jsonl", fragment_tokens=0), "fragment_tokens is 0"),
        (
            lambda: open_rows(["rows.jsonl", {"path": "rows.jsonl", "streaming": True}]),
            "some data sources are streamed",
        ),
        (lambda: SourceSpec.make({"split": "train"}), "lacks path"),
        (lambda: SourceSpec.make({"path": "x", "spilt": "train"}), "did you mean split"),
        (lambda: SourceSpec.make({"path": "x", "streaming": "yes"}), "streaming is 'yes'; it must be bool"),
        (lambda: SourceSpec.make(5), "a data source is 5"),
    ):
        with pytest.raises(ConfigError, match=said):
            call()
    for tokenizer in (None, object()):
        with pytest.raises(TokenizerMismatchError, match="needs a fast tokenizer"):
            open_source("rows.jsonl", tokenizer)
