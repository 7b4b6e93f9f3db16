"""Measurements of the golden adapter: known answers, resumed runs, and reproducible files."""

import json

import pytest
import torch
import torch.nn.functional as F

from helpers import golden
from helpers.evaluation import Cache, golden_icae, words
from icae_fast import ICAE, ICAEConfig
from icae_fast.errors import ConfigError, InvalidInputError, TokenizerMismatchError
from icae_fast.training.evaluation.evaluate import evaluate
from icae_fast.training.evaluation.plots import draw
from icae_fast.training.evaluation.report import result_values, write_result
from icae_fast.training.evaluation.result import Plot, Result
from icae_fast.training.evaluation.subject import Subject, parse_subject
from icae_fast.training.evaluation.texts.content import CONTENTS, restoration_by_content
from icae_fast.training.evaluation.texts.continuation import continuation_by_ratio, table_6
from icae_fast.training.evaluation.texts.passages import Texts
from icae_fast.training.evaluation.texts.restoration import restoration_by_length, restoration_by_memory_size
from icae_fast.training.evaluation.texts.scoring import UNSCORED, slot_scores, text_scores
from icae_fast.training.evaluation.texts.several_spans import several_spans
from icae_fast.training.evaluation.workbench import Workbench
from icae_fast.training.methods.objectives import continuation_sample

pytest.importorskip("sacrebleu", reason="BLEU needs sacrebleu")
pytest.importorskip("matplotlib", reason="plots need matplotlib")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def subject(make_tokenizer):
    return Subject("golden", golden_icae(make_tokenizer()))


@pytest.fixture
def bench(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(words(900, 1))
    return Workbench(Texts([str(path)]), Cache(), samples=3)


def make_restorer(subject, monkeypatch, restore):
    """Make the subject restore a function of a context's ids, followed by EOS."""
    icae, compress = subject.icae, subject.icae.compress
    read = {}

    def remember(contexts, **options):
        memories = compress(contexts, **options)
        read.update({id(m): (m, list(c)) for m, c in zip(memories, contexts, strict=True)})
        return memories

    monkeypatch.setattr(icae, "compress", remember)
    monkeypatch.setattr(icae, "restore", lambda ms, return_ids: [[*restore(read[id(m)][1]), 2] for m in ms])


def test_a_perfect_restoration_scores_one(subject, bench, monkeypatch):
    make_restorer(subject, monkeypatch, lambda ids: ids)
    for row in restoration_by_length([subject], bench, lengths=(16, 40)).rows:
        assert row["bleu"] == row["bleu_median"] == row["prefix_low"] == row["identical"] == 1
        assert row["accuracy"] < 0.5  # the stub does not affect teacher forcing
    assert all(row["bleu"] == 1 for row in restoration_by_content([subject], bench).rows)


def test_a_restoration_that_breaks_at_half(subject, bench, monkeypatch):
    make_restorer(subject, monkeypatch, lambda ids: ids[: len(ids) // 2] + [1] * 40)
    result = restoration_by_length([subject], bench, lengths=(16, 64))  # and beyond a span
    assert [row["tokens"] for row in result.rows] == [16, 64]
    for row in result.rows:
        assert row["prefix_low"] == row["prefix_median"] == row["prefix_high"] == 0.5
        assert row["identical"] == 0
        assert 0 < row["bleu"] < 1
    assert len(result.samples) == 6
    assert result.samples[0]["original"].split()[:8] == result.samples[0]["restored"].split()[:8]


def test_teacher_forced_figures_are_the_loss_of_training(subject, bench):
    icae = subject.icae
    row = restoration_by_length([subject], bench, lengths=(16,)).rows[0]
    losses = []
    for e in bench.draw(subject, 16):
        memories = [icae.vocabulary.first_memory] * 8
        prompt = torch.tensor([*memories, icae.vocabulary.ae, *e.ids])
        labels = torch.tensor([-100] * 9 + e.ids)
        losses.append(icae([torch.tensor(e.ids)], [prompt], [labels])["loss"].item())
    assert row["loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_continuations_are_scored_alike_by_all_readers(subject, bench):
    icae = subject.icae
    e = bench.draw(subject, 24, following=20, count=1)[0]
    (scores,) = text_scores(subject, [e.ids], [e.following], bench)
    ids = torch.tensor([e.ids + e.following])
    logits = icae.base_model(ids).logits[0, :-1]
    expected = F.cross_entropy(logits, ids[0, 1:], reduction="none")[-(20 - UNSCORED) :]
    assert (scores.count, scores.mean_loss) == (20 - UNSCORED, pytest.approx(expected.mean().item(), rel=1e-5))
    (scores,) = slot_scores(subject, [e.ids], [e.following], bench)
    sample = continuation_sample(icae, e.ids, e.following)
    loss = icae(*([torch.tensor(x)] for x in (sample.input_ids, sample.prompt_answer_ids, sample.labels)))["loss"]
    assert (scores.count, scores.mean_loss) == (20 - UNSCORED, pytest.approx(loss.item(), rel=1e-5))
    (scores,) = text_scores(subject, [[]], [e.following], bench)
    assert scores.count == 20 - UNSCORED


def test_continuation_against_ratio_several_subjects_side_by_side(subject, bench, make_tokenizer):
    other = Subject("other", golden_icae(make_tokenizer()))
    result = continuation_by_ratio([subject, other], bench, memory_sizes=(2, 3, 4, 99))
    mine, others = ([row for row in result.rows if row["subject"] == name] for name in ("golden", "other"))
    assert [(row["slots"], row["ratio"]) for row in mine] == [(2, 16), (4, 8), (8, 4)]
    assert [row | {"subject": "golden"} for row in others] == mine
    assert mine[0]["ppl_text"] == mine[2]["ppl_text"]
    assert mine[0]["ppl_truncated"] != mine[2]["ppl_truncated"]
    assert {"loss_slots", "loss_text", "loss_truncated", "loss_nothing"} <= set(result.samples[0])


def test_the_base_model_reads_a_text_once_for_all_adapters(subject, bench, make_tokenizer):
    other = golden_icae(make_tokenizer())
    with torch.no_grad():
        other.memory_token_embed.weight.mul_(2)
    continuation_by_ratio([subject], bench, memory_sizes=())
    before = len(bench.cache)
    continuation_by_ratio([Subject("other", other)], bench, memory_sizes=())
    assert len(bench.cache) == before + bench.samples  # only the scores after slots


def test_restoration_against_k(subject, bench):
    result = restoration_by_memory_size([subject], bench, memory_sizes=(4,), lengths=(16, 32, 512))
    assert [(row["slots"], row["tokens"]) for row in result.rows] == [(4, 16), (4, 32), (8, 16), (8, 32)]


def test_lengths_go_with_the_span_and_long_passages_are_fewer(subject, bench, monkeypatch):
    monkeypatch.setattr("icae_fast.training.evaluation.texts.restoration.PAPER_LENGTHS", (20,))
    monkeypatch.setattr("icae_fast.training.evaluation.workbench.FEWEST_PASSAGES", 2)
    rows = restoration_by_length([subject], bench).rows
    assert [(row["tokens"], row["passages"]) for row in rows] == [
        (8, 3), (16, 3), (20, 3), (32, 3), (64, 2), (128, 2),
    ]  # fmt: skip
    assert [row["tokens"] for row in restoration_by_memory_size([subject], bench, ()).rows] == [8, 16, 32]
    bench.samples = 32
    assert [bench.affordable([subject], n) for n in (16, 32, 64, 1000)] == [32, 32, 16, 2]
    # Compared with an adapter of longer spans, both use the same passages.
    other = Subject("other", ICAE.from_base(golden.load_base(), ICAEConfig(memory_size=16), subject.icae.tokenizer))
    assert [bench.affordable([subject, other], n) for n in (64, 128)] == [32, 16]


def test_contents_are_the_same_every_time_and_what_they_are_called(subject, bench):
    excerpts = bench.draw(subject, 20)
    made = {name: content(subject, excerpts, 0) for name, content in CONTENTS.items()}
    assert made == {name: content(subject, excerpts, 0) for name, content in CONTENTS.items()}
    assert made["normal text"] == excerpts
    for e, shifted in zip(excerpts, made["patterned random"], strict=True):
        assert shifted.ids == [3 if i == 95 else i + 1 for i in e.ids]  # 0 to 2 are special
    assert {i for e in made["random words"] for i in e.ids} <= {i for e in excerpts for i in e.ids}
    assert all(len(e.ids) == 20 and min(e.ids) >= 3 for name in made for e in made[name])
    assert made["random tokens"] != CONTENTS["random tokens"](subject, excerpts, 1)


def test_table_6_has_the_published_rows_with_their_source(subject, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text(words(1500, 2))
    result = table_6([subject], Workbench(Texts([str(path)]), Cache(), samples=1))
    assert [row["source"] for row in result.rows] == ["measured here"] + 3 * ["arXiv 2307.06945, Table 6"]
    assert result.rows[1]["ppl_slots"] == 9.5
    assert (result.rows[0]["context"], result.rows[0]["slots"]) == (512, 128)


def test_several_spans_and_what_does_not_fit(subject, bench):
    subject.icae.max_positions = 220
    result = several_spans([subject], bench, spans=(1, 4, 16, 64))
    assert [row["spans"] for row in result.rows] == [1, 4]
    assert result.rows[0]["bleu"] is not None
    assert result.rows[1]["ppl_text"] is None  # 128 + 128 tokens
    several, icae = result.samples[-1], subject.icae
    assert (several["tokens"], several["original"] != several["restored_by_span"]) == (128, True)
    ids = icae.tokenizer(several["original"], add_special_tokens=False)["input_ids"]
    assert several["restored_by_span"] == icae.restore_by_span(icae.compress(torch.tensor(ids))[0])
    skipped = " ".join(result.facts["skipped"])
    assert "golden, 16 spans: " in skipped
    assert "golden, 64 spans: none of the texts has" in skipped


MEASUREMENTS = {
    "restoration_by_length": lambda subjects, bench: restoration_by_length(subjects, bench, lengths=(16, 24)),
    "several_spans": lambda subjects, bench: several_spans(subjects, bench, spans=(1, 2)),
    "table_6": lambda subjects, bench: table_6(subjects, bench),
}


def test_an_interrupted_run_goes_on_and_gives_the_same_files(subject, bench, tmp_path, monkeypatch):
    folders = {name: tmp_path / name for name in ("whole", "broken")}
    for folder in folders.values():
        folder.mkdir()
    _, not_measured = evaluate([subject], bench, MEASUREMENTS, folders["whole"])
    cut = len(bench.cache) * 2 // 3
    bench.cache = Cache(interrupt_after=cut)
    with pytest.raises(KeyboardInterrupt):
        evaluate([subject], bench, MEASUREMENTS, folders["broken"])
    assert (folders["broken"] / "restoration_by_length.json").exists()
    assert not (folders["broken"] / "several_spans.json").exists()
    bench.cache.interrupt_after = None
    evaluate([subject], bench, MEASUREMENTS, folders["broken"])
    names = sorted(path.name for path in folders["whole"].iterdir())
    assert names == sorted(path.name for path in folders["broken"].iterdir())
    assert {"summary.md", "several_spans.png", "several_spans.svg", "several_spans.samples.jsonl"} <= set(names)
    for name in names:
        assert (folders["whole"] / name).read_bytes() == (folders["broken"] / name).read_bytes(), name
    assert not_measured == {}
    # A third run computes nothing.
    monkeypatch.setattr(subject.icae, "compress", None)
    monkeypatch.setattr(subject.icae, "token_losses", None)
    evaluate([subject], bench, MEASUREMENTS, folders["broken"])


def test_what_cannot_be_measured_is_in_the_summary(subject, bench, tmp_path):
    subject.icae.max_positions = 300
    results, not_measured = evaluate([subject], bench, MEASUREMENTS, tmp_path)
    assert list(not_measured) == ["table_6"]
    assert "300" in not_measured["table_6"]
    assert [r.name for r in results] == ["restoration_by_length", "several_spans"]
    summary = (tmp_path / "summary.md").read_text()
    assert "* table_6: golden: a prompt with its slots takes" in summary
    assert "![Restoration by length](restoration_by_length.png)" in summary
    assert "arXiv 2406.13618" in summary
    run = json.loads((tmp_path / "several_spans.json").read_text())["run"]
    assert run["subjects"][0]["adapter"] == subject.origin.adapter_hash
    assert run["machine"]["versions"]["torch"] == torch.__version__


def test_plots_leave_out_what_has_no_value_and_are_the_same_every_time():
    rows = [
        {"n": 1, "y": 0.5, "low": 0.4, "high": 0.7, "of": "a"}, {"n": 2, "y": None, "of": "a"},
        {"n": 2, "y": float("inf"), "of": "b"}, {"n": 4, "y": 0.9, "low": None, "high": None, "of": "b"},
    ]  # fmt: skip
    plots = [
        Plot("line", "n", "y", "of", "low", "high", x_log=True, y_max=1),
        Plot("bar", "n", "y", "of", "low", "high"),
    ]
    result = Result("r", "Some figures", {"n": "", "y": ""}, rows, plots=plots)
    files = draw(result)
    assert files[".png"].startswith(b"\x89PNG")
    assert b"Some figures" in files[".svg"]
    assert files == draw(result)
    assert draw(Result("r", "", {}, rows[1:3], plots=plots)) == {}
    assert result_values(result)["rows"][2]["y"] is None


def test_labels_of_bars_are_wrapped_or_aslant():
    def draw_bars(labels):
        rows = [{"name": name, "y": 1, "of": "ab"[i % 2]} for i, name in enumerate(labels)]
        return draw(Result("r", "", {}, rows, plots=[Plot("bar", "name", "y", "of")]))[".svg"].decode()

    few = draw_bars(["normal text", "a rather long name of a contestant"])
    assert "rotate(-35" not in few
    assert "a rather long name of a" in few
    assert "name of a contestant" not in few
    many = draw_bars([f"a contestant, number {i}" for i in range(9)])
    assert many.count("rotate(-35") == 9
    assert "a contestant, number 8" in many


def test_files_of_an_earlier_run_do_not_outlive_their_figures(tmp_path, bench, subject):
    rows = [{"n": 1, "y": 2}]
    write_result(tmp_path, Result("r", "", {"n": ""}, rows, plots=[Plot("bar", "n", "y")], samples=[{"a": 1}]), {})
    assert {p.suffix for p in tmp_path.glob("r.*")} == {".json", ".jsonl", ".png", ".svg"}
    write_result(tmp_path, Result("r", "", {"n": ""}, rows), {})
    assert [p.name for p in tmp_path.glob("r.*")] == ["r.json"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("runs/a/adapter", ("adapter", "runs/a/adapter", None)),
        ("mine=someone/adapter", ("mine", "someone/adapter", None)),
        ("mine=folder@Qwen/Qwen3-0.6B", ("mine", "folder", "Qwen/Qwen3-0.6B")),
        ("folder@model", ("folder", "folder", "model")),
    ],
)
def test_how_subjects_are_named(text, parts):
    spec = parse_subject(text)
    assert (spec.name, spec.adapter, spec.model) == parts


@pytest.mark.parametrize("text", ["", "=folder", "mine=", "mine=folder@"])
def test_a_subject_that_is_not_named_whole(text):
    with pytest.raises(InvalidInputError, match="NAME=PATH@MODEL"):
        parse_subject(text)


def test_subjects_need_a_tokenizer_and_k_that_divides(subject):
    with pytest.raises(TokenizerMismatchError, match="fast tokenizer"):
        Subject("bare", golden_icae(None))
    with pytest.raises(ConfigError):
        subject.with_memory_size(5)
    assert subject.memory_sizes((4, 5, 64)) == [4, 8]
