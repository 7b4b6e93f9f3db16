"""The stream of micro-batches is the same from any position and for any number of processes."""

import json
import pickle
from itertools import islice
from types import SimpleNamespace

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icae_fast.core.spans import count_spans
from icae_fast.errors import ConfigError, DataError
from icae_fast.training.data import stream as stream_module
from icae_fast.training.data.records import PWC
from icae_fast.training.data.rows import MappedSource
from icae_fast.training.data.samples import InstructionDraw, PretrainingDraw
from icae_fast.training.data.sources import open_source
from icae_fast.training.data.stream import BatchStream, held_out
from icae_fast.training.methods.batch import pack
from icae_fast.training.methods.curriculum import Curriculum, Stage

STAGES = Curriculum([
    Stage(3, {"warm": 1}, 8),
    Stage(4, {"ae": 1, "lm": 1}, 24, 10, memory_sizes=(1, 2, 4), wrong_tokens=0.3, own_tokens=0.5),
    Stage(1, {"ae": 2, "lm": 1}, 48, 20),
])  # fmt: skip
PLAIN = Curriculum([Stage(1, {"ae": 1, "lm": 1}, 32, 8)])
SIZES = {"tokens_per_step": 400, "micro_batch_tokens": 110, "window_steps": 3}


def mapped(lengths, fragment_tokens=None, seed=0):
    columns = {
        "origin": [f"rows:{i}" for i in range(len(lengths))],
        "problem": ["" if n else "field 'text' is empty" for n in lengths],
        "text_ids": [[3 + (7 * i + j) % 90 for j in range(n)] for i, n in enumerate(lengths)],
    }
    text, ids = datasets.Value("string"), datasets.List(datasets.Value("int32"))
    features = datasets.Features({"origin": text, "problem": text, "text_ids": ids})
    return MappedSource(datasets.Dataset.from_dict(columns, features), ("text",), fragment_tokens, seed)


@pytest.fixture
def open_jsonl(tmp_path, make_tokenizer):
    """Return `open_jsonl(lengths, streaming)`: three files of documents of these lengths, each with a bad row."""

    def open_(lengths, streaming, **options):
        for i in range(3):
            rows = [{"text": " ".join(f"w{3 + (n + j) % 90}" for j in range(n))} for n in lengths[i::3]]
            rows.insert(1, {"text": " "})
            (tmp_path / f"{i}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        spec = {"path": str(tmp_path / "*.jsonl"), "streaming": streaming}
        return open_source(spec, make_tokenizer(), cache_folder=str(tmp_path / "cache"), **options)

    return open_


def steps_of(streams, n):
    """Return the first n steps as sets of samples, from the streams of all ranks."""
    its = [iter(s) for s in streams]
    steps = []
    for number in range(n):
        batches = [next(it) for it, s in zip(its, streams, strict=True) for _ in range(s.micro_batches_per_step)]
        assert all(batch.step == number for batch in batches)
        steps.append(sorted(repr((sample, batch.memory_size)) for batch in batches for sample in batch))
    return steps


def assert_resumes(make, n, every=1):
    """Assert that loading the state after each of the first n micro-batches repeats the micro-batches that followed."""
    stream = make()
    it = iter(stream)
    states, batches, counts = [stream.state_dict()], [], [stream.counts]
    for batch in islice(it, n):
        batches.append(batch)
        states.append(json.loads(json.dumps(stream.state_dict())))
        assert states[-1] == json.loads(json.dumps(batch.state))
        counts.append(stream.counts)
    for i in range(0, n, every):
        resumed = make()
        resumed.load_state_dict(states[i])
        assert resumed.state_dict() == states[i]
        assert resumed.counts == counts[i]
        again = list(islice(resumed, n - i))
        assert again == batches[i:]
        assert [(b.step, b.memory_size) for b in again] == [(b.step, b.memory_size) for b in batches[i:]]
        assert resumed.counts == counts[n]
        assert resumed.state_dict() == states[n]
    return batches


@settings(max_examples=25)
@given(
    st.lists(st.integers(0, 150), min_size=1, max_size=12).filter(any),
    st.sampled_from([STAGES, PLAIN]),
    st.sampled_from([None, 16, 48]),
    st.sampled_from(["all", "one"]),
    st.integers(1, 500),
    st.integers(1, 200),
    st.integers(1, 4),
    st.integers(0, 3),
)
def test_resumes_at_every_micro_batch(
    tiny_icae, lengths, curriculum, fragment, excerpts, tokens_per_step, budget, window_steps, seed
):
    def make():
        return BatchStream(
            mapped(lengths, fragment, seed), PretrainingDraw(tiny_icae, excerpts=excerpts), curriculum,
            tokens_per_step=tokens_per_step, micro_batch_tokens=budget, window_steps=window_steps, seed=seed,
        )  # fmt: skip

    per_step = make().micro_batches_per_step
    n = min(12 * per_step, 40)
    batches = assert_resumes(make, n, every=5)
    for i, batch in enumerate(batches):
        assert batch.step == i // per_step
        _, stage = curriculum.stage_at(batch.step)
        assert len(batch) == 1 or sum(s.n_tokens for s in batch) <= budget
        assert batch.memory_size in (stage.memory_sizes or (None,))
        for sample in batch:
            assert len(sample.input_ids) <= stage.max_tokens
            slots = sum(97 <= token < 101 for token in sample.prompt_answer_ids)
            assert slots == count_spans(len(sample.input_ids), tiny_icae.config) * (batch.memory_size or 4)


@pytest.mark.parametrize("streaming", [False, True])
def test_resumes_over_epochs_of_files(tiny_icae, open_jsonl, streaming):
    lengths = [5 * i % 130 + 1 for i in range(60)]

    def make():
        return BatchStream(open_jsonl(lengths, streaming), PretrainingDraw(tiny_icae), STAGES, **SIZES)

    stream = make()
    n = next(i for i, _ in enumerate(stream, 1) if stream.epoch == 2)
    assert stream.step > 15
    assert_resumes(make, n, every=11)
    assert stream.counts == {"skipped: field 'text' is empty": 3}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("curriculum", [STAGES, PLAIN])
def test_world_sizes_give_the_same_steps(tiny_icae, open_jsonl, streaming, curriculum):
    lengths = [11 * i % 140 + 1 for i in range(40)]

    def streams(world):
        return [
            BatchStream(open_jsonl(lengths, streaming), PretrainingDraw(tiny_icae), curriculum, rank=r,
                        world_size=world, **SIZES)
            for r in range(world)
        ]  # fmt: skip

    alone = steps_of(streams(1), 12)
    assert steps_of(streams(2), 12) == alone
    assert steps_of(streams(4), 12) == alone
    assert len({tuple(step) for step in alone}) == 12


def test_another_number_of_processes_may_go_on(tiny_icae):
    def make(rank=0, world=1):
        return BatchStream(mapped([90] * 20), PretrainingDraw(tiny_icae), PLAIN, rank=rank, world_size=world, **SIZES)

    expected = steps_of([make()], 9)
    two = [make(rank, 2) for rank in range(2)]
    assert steps_of(two, 5) == expected[:5]
    assert two[0].state_dict() == two[1].state_dict() | {"counts": {}}
    resumed = make()
    resumed.load_state_dict(two[0].state_dict())
    assert resumed.step == 5
    assert [sorted(repr((s, b.memory_size)) for b in islice(resumed, 4) for s in b) for _ in range(4)] == expected[5:]
    list(islice(two[0], 1))
    with pytest.raises(ConfigError, match="within a step"):
        make().load_state_dict(two[0].state_dict())


@pytest.mark.parametrize("excerpts", ["all", "one"])
def test_an_epoch_has_every_row(tiny_icae, excerpts):
    lengths = [n % 60 + 1 for n in range(100)]
    stages = Curriculum([Stage(1, {"ae": 1}, 64)])
    stream = BatchStream(mapped(lengths), PretrainingDraw(tiny_icae, excerpts=excerpts), stages, **SIZES)
    samples = [s for batch in islice(stream, 4000) for s in batch]
    times = [sum(s.origin == f"rows:{i}" for s in samples) for i in range(100)]
    # Steps mix neighbouring rows, so the last epoch may end anywhere.
    assert max(times) - min(times) <= 1
    assert min(times) > 20


def test_the_rest_of_a_row_ends_with_its_stage(tiny_icae):
    stages = Curriculum([Stage(1, {"ae": 1}, 16), Stage(1, {"ae": 1}, 160)])
    source = mapped([160] * 8)
    stream = BatchStream(source, PretrainingDraw(tiny_icae), stages, **(SIZES | {"window_steps": 1}))
    order = [source[int(i)].origin for i in source.order(0)]
    batches = list(islice(stream, 2 * stream.micro_batches_per_step))
    origins = [sorted(s.origin for b in batches if b.step == step for s in b) for step in range(2)]
    # Eight of the first row's ten excerpts fill the first step, and the next stage begins with the second row.
    assert origins == [[order[0]] * 8, sorted(order[1:5])]


def test_steps_are_about_as_large_as_asked_for(tiny_icae):
    stream = BatchStream(
        mapped([n % 60 + 1 for n in range(500)]), PretrainingDraw(tiny_icae), PLAIN, tokens_per_step=3000,
        micro_batch_tokens=1000, window_steps=8,
    )  # fmt: skip
    assert stream.micro_batches_per_step == 3
    costs = [sum(s.n_tokens for s in batch) for batch in islice(stream, 3 * 40)]
    steps = [sum(costs[i : i + 3]) for i in range(0, len(costs), 3)]
    assert max(costs) <= 1000
    assert min(costs) > 850
    assert all(2700 < step <= 3000 for step in steps)


def test_counts_of_rows(tiny_icae, tmp_path, make_tokenizer, caplog):
    text = " ".join(["w5"] * 30)
    rows = [{"input": text, "prompt": "w6", "answer": "w7"}] * 3 + [{"input": "w5", "prompt": "w6"}]
    (tmp_path / "pwc.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(rank=0):
        source = open_source(str(tmp_path / "pwc.jsonl"), make_tokenizer(), PWC, cache_folder=str(tmp_path / "cache"))
        draw = InstructionDraw(tiny_icae, max_context_tokens=20)
        return BatchStream(source, draw, Curriculum([Stage(1, {"ft": 1}, 40)]), rank=rank, world_size=2, **SIZES)

    # Four micro-batches per step and windows of three steps: at least twelve of about thirty tokens each.
    stream = make()
    batches = list(islice(stream, 2))
    assert stream.counts["skipped: no field 'answer'"] == 1
    assert stream.counts["truncated: context too long"] >= 12
    assert "pwc.jsonl:4: skipped: no field 'answer'" in caplog.text
    assert "pwc.jsonl:1: truncated: context too long (the first 20 of 30 tokens are kept)" in caplog.text
    assert "truncated: context too long: more such rows are counted, not listed" in caplog.text
    assert len(caplog.records) == 1 + 20 + 1
    assert {len(s.input_ids) for b in batches for s in b} == {20}
    caplog.clear()
    other = make(rank=1)
    list(islice(other, 2))
    assert other.counts == stream.counts
    assert not caplog.records


def test_rows_that_all_are_skipped(tiny_icae, tmp_path, make_tokenizer):
    path = tmp_path / "pwc.jsonl"
    path.write_text(json.dumps({"input": "w5 w5", "prompt": "w6", "answer": "w7"}) + "\n")
    for streaming in (False, True):
        source = open_source({"path": str(path), "streaming": streaming}, make_tokenizer(), PWC,
                             cache_folder=str(tmp_path / "cache"))  # fmt: skip
        draw = InstructionDraw(tiny_icae, max_context_tokens=1, on_long_row="skip")
        stage = Stage(1, {"ft": 1}, 40)
        with pytest.raises(DataError, match=r"no row of the data yields a sample.*'skipped: context too long': 1"):
            next(iter(BatchStream(source, draw, Curriculum([stage]), **SIZES)))
        with pytest.raises(DataError, match="no held-out row yields a sample"):
            held_out(source, draw, stage, 4, 100)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_keeps_the_place(tiny_icae, open_jsonl, streaming, workers):
    lengths = [11 * i % 140 + 1 for i in range(40)]

    def make():
        return BatchStream(open_jsonl(lengths, streaming), PretrainingDraw(tiny_icae), STAGES, **SIZES)

    plain = make()
    expected = [pack(batch) for batch in islice(plain, 20)]
    stream = make()
    given = list(islice(stream.loader(pack, workers), 9))
    assert stream.step == 2
    resumed = make()
    resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    given += islice(resumed.loader(pack, workers), 11)
    assert [[v.tolist() if isinstance(v, torch.Tensor) else v for v in vars(b).values()] for b in given] == [
        [v.tolist() if isinstance(v, torch.Tensor) else v for v in vars(b).values()] for b in expected
    ]
    assert resumed.state_dict() == plain.state_dict()
    assert resumed.counts == plain.counts


@pytest.mark.parametrize("streaming", [False, True])
def test_a_stream_can_be_sent_to_a_worker(tiny_icae, open_jsonl, streaming):
    stream = BatchStream(open_jsonl([50] * 9, streaming), PretrainingDraw(tiny_icae), PLAIN, **SIZES)
    sent = pickle.loads(pickle.dumps(stream))
    assert list(islice(sent, 9)) == list(islice(stream, 9))


def test_more_workers_are_refused(tiny_icae, monkeypatch):
    batches = BatchStream(mapped([50]), PretrainingDraw(tiny_icae), PLAIN, **SIZES)
    with pytest.raises(ConfigError, match="2 workers; the stream supports 0 or 1"):
        batches.loader(num_workers=2)
    monkeypatch.setattr(stream_module, "get_worker_info", lambda: SimpleNamespace(num_workers=2))
    with pytest.raises(ConfigError, match="2 workers; the stream supports 0 or 1"):
        next(iter(batches))


def test_wrong_options_and_states_are_refused(tiny_icae):
    draw = PretrainingDraw(tiny_icae)

    def make(source=None, curriculum=PLAIN, **changed):
        return BatchStream(source or mapped([50]), draw, curriculum, **(SIZES | changed))

    for call, said in (
        (lambda: make(tokens_per_step=0), "tokens_per_step is 0"),
        (lambda: make(rank=2, world_size=2), "rank is 2; it must be 0 to 1"),
        (lambda: make(curriculum=Curriculum([Stage(1, {"ae": 1}, 9), Stage(1, {"ft": 1}, 9)])), "stage 1: .*'ft'"),
        (lambda: make(curriculum=Curriculum([Stage(1, {"ae": 1}, 9, memory_sizes=(3,))])), "stage 0: .*3"),
        (lambda: BatchStream(mapped([50]), InstructionDraw(tiny_icae), PLAIN, **SIZES), "the rows have text"),
        (lambda: make(seed=1).load_state_dict(make().state_dict()), "seed was 0 and is 1"),
        (lambda: make().load_state_dict(make(tokens_per_step=500).state_dict()), "tokens_per_step was 500 and is 400"),
        (lambda: make().load_state_dict({}), "version was None and is 1"),
    ):
        with pytest.raises(ConfigError, match=said):
            call()
    state = list(islice(make(), 12))[-1].state
    grown = make(mapped([50, 50]))
    grown.load_state_dict(state)
    with pytest.raises(DataError, match="the data has 2 rows, and had 1"):
        next(iter(grown))


def test_held_out_samples(tiny_icae):
    draw, stage = PretrainingDraw(tiny_icae), Stage(1, {"ae": 1, "lm": 1}, 32, 8)
    source = mapped([n % 90 for n in range(40)])
    batches = held_out(source, draw, stage, 30, 150)
    assert batches == held_out(mapped([n % 90 for n in range(40)]), draw, stage, 30, 150)
    assert sum(map(len, batches)) == 30
    assert all(len(batch) == 1 or sum(s.n_tokens for s in batch) <= 150 for batch in batches)
    costs = [s.n_tokens for batch in batches for s in batch]
    assert costs == sorted(costs)
    assert sum(map(len, held_out(mapped([5, 6]), draw, stage, 30, 150))) == 2
