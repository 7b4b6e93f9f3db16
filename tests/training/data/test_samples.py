"""Drawing samples from rows: excerpts of documents, and instructions, with counts of truncated and skipped rows."""

import itertools
import logging
import pickle
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from icae_fast.errors import ConfigError
from icae_fast.training.data.rows import Row
from icae_fast.training.data.samples import InstructionDraw, PretrainingDraw, SampleLayout
from icae_fast.training.data.tally import Tally
from icae_fast.training.methods.batch import pack
from icae_fast.training.methods.curriculum import Stage
from icae_fast.training.methods.objectives import (
    autoencoding_sample,
    continuation_sample,
    draw_excerpt,
    with_memory_size,
    with_own_tokens,
    with_wrong_tokens,
)

K, SPAN, EOS, POSITIONS = 4, 16, 2, 256
AE_ONLY = Stage(1, {"ae": 1}, 32)


def text_row(n, start=0, end=None, key="0"):
    return Row(key, f"text:{key}", (np.arange(n, dtype=np.int32),), start, n if end is None else end)


def instruction_row(*lengths):
    return Row("0", "pwc:0", tuple(np.full(n, 3 + i, dtype=np.int32) for i, n in enumerate(lengths)), 0, lengths[0])


def draw(drawer, row, stage, seed=0):
    tally = Tally()
    drafts = drawer(row, stage, random.Random(seed), tally)
    samples = [d.build() for d in drafts]
    assert [d.cost for d in drafts] == [s.n_tokens for s in samples]
    return samples, tally.counts


@given(
    st.integers(1, 400),
    st.integers(1, 90),
    st.integers(1, 90),
    st.sampled_from([{"ae": 1}, {"lm": 1}, {"ae": 1, "lm": 1}, {"warm": 1}]),
    st.sampled_from(["all", "one"]),
    st.sampled_from([None, (1, 3), (5, 5)]),
    st.sampled_from([None, 70]),
    st.booleans(),
    st.integers(0, 9),
)
def test_excerpts_of_a_document(tiny_icae, n, a, b, objectives, excerpts, spans, target, lm_token, seed):
    stage = Stage(1, objectives, max(a, b), min(a, b))
    drawer = PretrainingDraw(tiny_icae, excerpts=excerpts, spans=spans, max_target_tokens=target, lm_token=lm_token)
    longest = min(stage.max_tokens, spans[1] * SPAN if spans else 999)
    if "lm" in objectives and "ae" not in objectives and longest <= 64:
        with pytest.raises(ConfigError, match=f"more than 64, but the excerpts have at most {longest}"):
            drawer.check(stage)
        return
    drawer.check(stage)
    samples, counts = draw(drawer, text_row(n), stage, seed)
    assert samples == draw(drawer, text_row(n), stage, seed)[0]
    assert set(counts) <= ({"skipped: too few tokens to continue an excerpt"} if objectives == {"lm": 1} else set())
    assert len(samples) + sum(counts.values()) >= 1
    assert excerpts == "all" or len(samples) + sum(counts.values()) == 1
    lengths = {min(s * SPAN, stage.max_tokens) for s in range(*(spans[0], spans[1] + 1))} if spans else None
    for sample in samples:
        context = sample.input_ids
        assert sample.origin == "text:0"
        assert context == list(range(context[0], context[0] + len(context)))
        assert len(context) in lengths | set(range(1, n + 1)) if spans else len(context) <= max(a, b)
        if sample.objective == "lm":
            target_ids = sample.prompt_answer_ids[-(-len(context) // SPAN) * K + lm_token :]
            assert target_ids == list(range(context[-1] + 1, context[-1] + 1 + len(target_ids)))
            assert 64 < len(target_ids) <= min(target or 999, stage.max_tokens)
        else:
            assert sample.objective == "ae"
            assert objectives != {"lm": 1}
            assert [label for label in sample.labels if label != -100] == [*context, EOS]
        assert "lm" in objectives or n <= len(context) or len(context) >= min(a, b, SPAN)


@given(st.integers(1, 80), st.floats(0, 1), st.integers(0, 2**32))
def test_wrong_tokens_are_read_and_not_learned(tiny_icae, n, most, seed):
    ids = list(range(20, 20 + n))
    sample = autoencoding_sample(tiny_icae, ids)
    wrong = with_wrong_tokens(sample, most, random.Random(seed))
    assert replace(wrong, prompt_answer_ids=sample.prompt_answer_ids) == sample
    first = len(sample.prompt_answer_ids) - n - 1
    assert wrong.prompt_answer_ids[:first] == sample.prompt_answer_ids[:first]
    assert wrong.prompt_answer_ids[-1] == EOS
    assert set(wrong.prompt_answer_ids[first:-1]) <= set(ids)
    assert wrong == sample or most > 0
    continued = continuation_sample(tiny_icae, ids, ids)
    assert with_wrong_tokens(continued, 1.0, random.Random(seed)) == continued


def test_half_of_the_most_tokens_are_wrong(tiny_icae):
    sample, rng = autoencoding_sample(tiny_icae, list(range(20, 84))), random.Random(0)
    changed = [
        sum(a != b for a, b in zip(s.prompt_answer_ids, sample.prompt_answer_ids, strict=True)) / 64
        for s in (with_wrong_tokens(sample, 0.4, rng) for _ in range(200))
    ]
    assert 0.15 < sum(changed) / 200 < 0.21  # a token may be replaced by itself
    assert max(changed) > 0.3
    assert min(changed) < 0.05


@given(st.integers(1, 60), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 2**32), st.sampled_from([1, K]))
def test_own_tokens_are_of_the_text(tiny_icae, n, probability, seed, k):
    ids = list(range(20, 20 + n))
    sample = autoencoding_sample(tiny_icae, ids)
    own = with_own_tokens(sample, probability, random.Random(seed))
    assert replace(own, own_tokens=()) == sample
    own = with_memory_size(tiny_icae, own, k)
    first = len(own.prompt_answer_ids) - n - 1
    assert len(own.own_tokens) == len(own.prompt_answer_ids)
    assert not any(own.own_tokens[:first])
    assert not own.own_tokens[-1]
    assert probability > 0 or not any(own.own_tokens)
    continued = with_own_tokens(continuation_sample(tiny_icae, ids, ids), 1.0, random.Random(seed))
    assert not any(continued.own_tokens)
    batch = pack([own, continuation_sample(tiny_icae, ids, ids), continued])
    assert batch.own_tokens.nonzero()[:, 0].tolist() == [i for i, mark in enumerate(own.own_tokens) if mark]
    assert len(batch.own_tokens) == len(batch.prompt_answer_ids)
    assert pack([sample]).own_tokens is None


def test_four_in_five_tokens_are_the_decoders_own(tiny_icae):
    sample, rng = autoencoding_sample(tiny_icae, list(range(20, 84))), random.Random(0)
    shares = [sum(with_own_tokens(sample, 0.5, rng).own_tokens) / 64 for _ in range(200)]
    some = [share for share in shares if share]
    assert 80 < len(some) < 120
    assert 0.77 < sum(some) / len(some) < 0.83


def test_excerpts_are_within_their_text():
    for n, longest, wants_lm in itertools.product((1, 9, 10, 11, 30), (1, 10), (False, True)):
        found = {draw_excerpt(random.Random(seed), n, longest, (0, n), wants_lm) for seed in range(200)}
        if n > longest:
            assert found == {(start, start + longest) for start in range(n - longest + 1)}
        else:
            assert found == ({(0, end) for end in range(1, n + 1)} if wants_lm else {(0, n)})


def test_all_excerpts_cover_a_document_evenly(tiny_icae):
    drawer = PretrainingDraw(tiny_icae)
    seen = Counter()
    for seed in range(300):
        samples, _ = draw(drawer, text_row(320), AE_ONLY, seed)
        assert len(samples) == 10
        starts = [s.input_ids[0] for s in samples]
        assert all(32 * i <= start < 32 * (i + 1) or start == 288 for i, start in enumerate(starts))
        seen.update(token for s in samples for token in s.input_ids)
    inner = [seen[token] for token in range(32, 288)]
    assert min(inner) > 200
    assert max(inner) < 400


def test_excerpts_begin_in_their_part_of_a_document(tiny_icae):
    drawer = PretrainingDraw(tiny_icae)
    starts = {s.input_ids[0] for seed in range(50) for s in draw(drawer, text_row(320, 64, 128), AE_ONLY, seed)[0]}
    assert min(starts) >= 64
    assert max(starts) < 128
    assert len(draw(drawer, text_row(320, 64, 128), AE_ONLY)[0]) == 2


def test_objectives_are_drawn_by_their_weights(tiny_icae):
    drawer = PretrainingDraw(tiny_icae)
    stage = Stage(1, {"ae": 1, "lm": 3}, 70)
    found = Counter(s.objective for seed in range(100) for s in draw(drawer, text_row(1400), stage, seed)[0])
    assert sum(found.values()) == 2000
    assert 0.65 < found["lm"] / 2000 < 0.75  # some of the last excerpts have too little text after them


def test_what_cannot_be_continued_is_told(tiny_icae, caplog):
    for drawer, tokens in ((PretrainingDraw(tiny_icae), 64), (PretrainingDraw(tiny_icae, spans=(1, 4)), 500)):
        with pytest.raises(ConfigError, match=r"raise the stage's max_tokens .* or train 'ae' in place of 'lm'"):
            drawer.check(Stage(1, {"lm": 1}, tokens))
        with caplog.at_level(logging.WARNING, "icae_fast.training"):
            drawer.check(Stage(1, {"ae": 1, "lm": 1}, tokens))
        assert "at most 64; all are restored" in caplog.text
        caplog.clear()
    drawer = PretrainingDraw(tiny_icae)
    drawer.check(Stage(1, {"lm": 1}, 65))
    drawer.check(Stage(1, {"ae": 1, "lm": 1}, 65))
    assert not caplog.text
    assert draw(drawer, text_row(64), Stage(1, {"lm": 1}, 100)) == (
        [],
        {"skipped: too few tokens to continue an excerpt": 1},
    )
    assert [s.objective for s in draw(drawer, text_row(64), Stage(1, {"ae": 0.1, "lm": 99}, 100))[0]] == ["ae"]


def test_positions_limit_what_is_learned(tiny_icae):
    drawer = PretrainingDraw(tiny_icae)
    with pytest.raises(ConfigError, match="300 tokens, restored, needs 378 positions"):
        drawer.check(Stage(1, {"ae": 1, "lm": 1}, 300))
    stage = Stage(1, {"lm": 1}, 600)  # 152 slots leave room for 104 tokens
    drawer.check(stage)
    sample = draw(drawer, text_row(1000), stage, 1)[0][0]
    assert len(sample.prompt_answer_ids) == POSITIONS
    # A row that ends after the excerpt cannot be continued, and 600 tokens cannot be restored.
    samples, counts = draw(drawer, text_row(600), Stage(1, {"lm": 1}, 599), 0)
    assert len(samples) + sum(counts.values()) == 2
    assert sum(counts.values()) >= 1
    with pytest.raises(ConfigError, match="continued by 65, needs 266 positions"):
        drawer.check(Stage(1, {"lm": 1}, 800))
    drawer.check(Stage(1, {"warm": 1}, 800))
    with pytest.raises(ConfigError, match="'ft'"):
        drawer.check(Stage(1, {"ft": 1}, 10))


def test_instructions(make_icae, make_tokenizer):
    template = "{% for m in messages %}w90 {{ m['content'] }} w91{% endfor %}"
    icae = make_icae(tokenizer=make_tokenizer(chat_template=template))
    drawer, stage = InstructionDraw(icae, max_context_tokens=20, max_answer_tokens=5), Stage(1, {"ft": 1}, 100)
    (sample,), counts = draw(drawer, instruction_row(20, 5, 4), stage)
    v = icae.vocabulary
    assert sample.prompt_answer_ids == [90, *[v.first_memory] * 8, v.ft, *[4] * 5, 91, *[5] * 4, EOS]
    assert sample.labels == [-100] * 16 + [5] * 4 + [EOS]
    assert (sample.objective, sample.origin) == ("ft", "pwc:0")
    assert not counts


def test_long_instructions_are_truncated_or_skipped(tiny_icae):
    stage, row = Stage(1, {"ft": 1}, 18), instruction_row(30, 6, 7)
    drawer = InstructionDraw(tiny_icae, max_context_tokens=20, max_answer_tokens=5)
    (sample,), counts = draw(drawer, row, stage)
    assert len(sample.input_ids) == 18  # the stage's limit is lower
    assert sample.prompt_answer_ids[-11:] == [tiny_icae.vocabulary.ft, *[4] * 5, *[5] * 5]  # and no EOS
    assert counts == {f"truncated: {name} too long": 1 for name in ("context", "prompt", "answer")}
    drawer = InstructionDraw(tiny_icae, max_context_tokens=20, max_answer_tokens=5, on_long_row="skip")
    assert draw(drawer, row, stage) == ([], {"skipped: context too long": 1})
    wide = InstructionDraw(tiny_icae, max_context_tokens=900, max_answer_tokens=200)
    samples, counts = draw(wide, instruction_row(10, 150, 150), Stage(1, {"ft": 1}, 900))
    assert (samples, counts) == ([], {"skipped: more than the base model's positions": 1})


def test_wrong_options_are_refused(tiny_icae):
    for make in (
        lambda: PretrainingDraw(tiny_icae, excerpts="some"),
        lambda: PretrainingDraw(tiny_icae, spans=(2, 1)),
        lambda: PretrainingDraw(tiny_icae, max_target_tokens=64),
        lambda: InstructionDraw(tiny_icae, on_long_row="stop"),
        lambda: InstructionDraw(tiny_icae, max_answer_tokens=0),
        lambda: InstructionDraw(tiny_icae).check(Stage(1, {"ae": 1}, 10)),
        lambda: InstructionDraw(tiny_icae, max_context_tokens=2000).check(Stage(1, {"ft": 1}, 2000)),
    ):
        with pytest.raises(ConfigError):
            make()


def test_a_layout_has_no_weights(make_icae, make_tokenizer):
    for prompt_format in ("chat", "plain", "v1"):
        icae = make_icae(tokenizer=make_tokenizer(chat_template="w90 {{ messages[0]['content'] }} w91 w92"),
                         prompt_format=prompt_format)  # fmt: skip
        layout = pickle.loads(pickle.dumps(SampleLayout(icae)))
        assert layout.prompt_ids([7, 8]) == icae.prompt_ids([7, 8])
        assert len(pickle.dumps(layout)) < 2000
