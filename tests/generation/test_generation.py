"""Greedy decoding from memories: batches, end-of-sequence ids, rows that leave, streamers and prompt layouts.

`test_models.py` compares the tokens with Hugging Face's generation loop for every architecture, `test_greedy.py` with
the baseline's.
"""

from types import SimpleNamespace

import pytest
import torch
from transformers import TextIteratorStreamer

from icae_fast.errors import InvalidInputError, TokenizerMismatchError
from icae_fast.generation import answers
from icae_fast.generation.decoding import DecodeSession

pytestmark = pytest.mark.usefixtures("one_thread")

TEMPLATE = "<bos> w90 w91 {{ messages[0]['content'] }} w92{% if add_generation_prompt %} w93{% endif %}"


@pytest.fixture
def icae(make_icae):
    """An ICAE without end-of-sequence ids; a test may set one."""
    icae = make_icae(seed=3)
    icae.base_model.generation_config.eos_token_id = []
    return icae


@pytest.fixture
def memory(icae, random_ids):
    return icae.compress(random_ids(40))[0]


@pytest.fixture
def prompts(random_ids):
    return [random_ids(n, seed=n).tolist() for n in (7, 1, 12, 3)]


def test_a_batch_of_prompts_equals_one_by_one(icae, memory, prompts):
    batch = icae.generate(memory, prompts, 15, return_ids=True)
    assert batch == [icae.generate(memory, p, 15, return_ids=True)[0] for p in prompts]
    assert [len(row) for row in batch] == [15] * 4
    assert len({tuple(row) for row in batch}) > 1
    assert icae.generate(memory, prompts[::-1], 15, return_ids=True) == batch[::-1]
    assert all(0 <= i < icae.vocabulary.n_base for row in batch for i in row)


def test_each_row_of_a_batch_ends_at_its_own_end_of_sequence(icae, memory, prompts):
    free = icae.generate(memory, prompts, 15, return_ids=True)
    for eos in sorted({i for row in free for i in row}):
        icae.base_model.generation_config.eos_token_id = [eos, 1]
        expected = [row[: row.index(eos) + 1] if eos in row else row for row in free]
        expected = [row[: row.index(1) + 1] if 1 in row else row for row in expected]
        assert icae.generate(memory, prompts, 15, return_ids=True) == expected


def test_the_end_of_sequence_id_is_the_last_and_never_before_min_new_tokens(icae, memory, prompts):
    free = icae.generate(memory, prompts[0], 15, return_ids=True)[0]
    eos = free[0]
    icae.base_model.generation_config.eos_token_id = eos
    assert icae.generate(memory, prompts[0], 15, return_ids=True) == [[eos]]
    forced = icae.generate(memory, prompts[0], 15, min_new_tokens=6, return_ids=True)[0]
    assert len(forced) >= 6
    assert eos not in forced[:6]
    whole = icae.generate(memory, prompts[0], 15, min_new_tokens=15, return_ids=True)[0]
    assert len(whole) == 15
    assert eos not in whole


def test_min_new_tokens_is_exact_to_one_token(icae, memory, prompts):
    free = icae.generate(memory, prompts[0], 15, return_ids=True)[0]
    place = max(i for i, token in enumerate(free) if token not in free[:i])
    assert place > 1
    icae.base_model.generation_config.eos_token_id = free[place]
    for least in (0, place - 1, place):
        assert icae.generate(memory, prompts[0], 15, min_new_tokens=least, return_ids=True) == [free[: place + 1]]
    held = icae.generate(memory, prompts[0], 15, min_new_tokens=place + 1, return_ids=True)[0]
    assert held[:place] == free[:place]
    assert held[place] != free[place]


@pytest.mark.parametrize("n", [0, 1])
def test_no_or_one_new_token_can_be_generated(icae, memory, prompts, n, streamer):
    assert [len(r) for r in icae.generate(memory, prompts, n, return_ids=True)] == [n] * 4
    icae.generate(memory, prompts[0], n, return_ids=True, streamer=streamer)
    assert (len(streamer.ids), streamer.ended) == (n, 1)


def test_the_streamer_receives_every_token_and_the_end(icae, memory, prompts, streamer):
    ids = icae.generate(memory, prompts[0], 9, return_ids=True, streamer=streamer)[0]
    assert streamer.ids == ids
    assert streamer.ended == 1
    icae.base_model.generation_config.eos_token_id = ids[0]
    icae.restore(memory, max_new_tokens=5, return_ids=True, streamer=streamer)
    assert streamer.ended == 2


def test_restore_generates_at_most_16_tokens_more_than_the_context_has(icae, random_ids):
    memory = icae.compress(random_ids(5))[0]
    assert len(icae.restore(memory, return_ids=True)) == 21
    assert icae.restore(memory, return_ids=True)[:4] == icae.restore(memory, max_new_tokens=4, return_ids=True)


def test_a_single_prompt_returns_a_list_of_one_answer(icae, memory):
    ids = [5, 6, 7]
    expected = icae.generate(memory, [ids], 4, return_ids=True)
    assert len(expected) == 1
    for same in (ids, tuple(ids), torch.tensor(ids), [torch.tensor(ids)]):
        assert icae.generate(memory, same, 4, return_ids=True) == expected


@pytest.fixture(params=[True, False], ids=["several steps a call", "one"])
def rows_of_steps(request, monkeypatch):
    """The number of rows in each decoding step after the first, as a list that grows with every step."""
    counts, step, greedy = [], DecodeSession.step, DecodeSession.greedy

    def counted(self, tokens, *limits):
        chosen = greedy(self, tokens, *limits)
        counts.extend([len(tokens)] * len(chosen))
        return chosen

    if request.param:
        monkeypatch.setattr(DecodeSession, "step", None)
        monkeypatch.setattr(DecodeSession, "greedy", counted)
    else:
        monkeypatch.setattr(DecodeSession, "runs_ahead", False)
        monkeypatch.setattr(DecodeSession, "step", lambda self, ids: counts.append(len(ids)) or step(self, ids))
    return counts


def test_a_row_that_ends_leaves_the_batch(icae, memory, prompts, rows_of_steps):
    free = icae.generate(memory, prompts, 15, return_ids=True)
    assert rows_of_steps == [4] * 14
    patterns = set()
    for eos in sorted({i for row in free for i in row}):
        rows_of_steps.clear()
        rows = icae.generate(memory, prompts, 15, return_ids=True, eos_token_id=eos)
        assert rows == [row[: row.index(eos) + 1] if eos in row else row for row in free]
        assert rows_of_steps == [sum(len(row) > n for row in rows) for n in range(1, max(map(len, rows)))]
        patterns.add(tuple(len(row) < 15 for row in rows))
    assert {(True, False, False, False), (False, False, False, True)} <= patterns  # the first row, and the last


@pytest.mark.parametrize(
    ("seconds", "options", "expected"),
    [
        (0.001, {}, [1, 8, 8, 2]),
        (0.018, {}, [1, 5, 5, 5, 3]),
        (0.5, {}, [1] * 19),
        (0.01, {"streamer": True}, [1, 3, 3, 3, 3, 3, 3]),
        (0.5, {"streamer": True}, [1] * 19),
        (0.001, {"min_new_tokens": 19}, [1, 8, 8, 2]),
    ],
)
def test_steps_run_ahead_for_a_tenth_of_a_second_and_less_with_a_streamer(
    icae, memory, streamer, monkeypatch, seconds, options, expected
):
    asked, clock, greedy = [], [0.0], DecodeSession.greedy

    def timed(self, tokens, most, *limits):
        asked.append(most)
        clock[0] += seconds * most
        return greedy(self, tokens, most, *limits)

    free = icae.generate(memory, [3, 4], 20, return_ids=True, eos_token_id=[])
    monkeypatch.setattr(DecodeSession, "greedy", timed)
    monkeypatch.setattr(answers, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    options = options | ({"streamer": streamer} if "streamer" in options else {})
    ids = icae.generate(memory, [3, 4], 20, return_ids=True, eos_token_id=[], **options)
    assert (ids, asked) == (free, expected)
    assert streamer.ids == (ids[0] if "streamer" in options else [])


def test_a_batch_of_memories_equals_one_by_one(icae, random_ids, prompts, monkeypatch):
    memories = icae.compress([random_ids(n, seed=n) for n in (40, 3, 16, 70)])
    one_by_one = [icae.generate(m, p, 9, return_ids=True)[0] for m, p in zip(memories, prompts, strict=True)]
    assert icae.generate(memories, prompts, 9, return_ids=True) == one_by_one
    assert icae.generate(memories[::-1], prompts[::-1], 9, return_ids=True) == one_by_one[::-1]
    to_all = [icae.generate(m, prompts[0], 9, return_ids=True)[0] for m in memories]
    assert icae.generate(memories, prompts[0], 9, return_ids=True) == to_all
    assert icae.generate(tuple(memories), prompts[:1], 9, return_ids=True) == to_all
    to_one = icae.generate(memories[0], prompts, 9, return_ids=True)
    assert icae.generate(memories[:1], prompts, 9, return_ids=True) == to_one
    read = []
    init = DecodeSession.__init__
    monkeypatch.setattr(
        DecodeSession,
        "__init__",
        lambda self, *args: read.append(len({tuple(map(id, p)) for p in args[1]})) or init(self, *args),
    )
    first, second = memories[:2]
    assert icae.generate([first, second, first], prompts[:3], 9, return_ids=True) == [
        to_one[0], one_by_one[1], to_one[2],
    ]  # fmt: skip
    assert read == [2]  # the memory with two prompts is read once


def test_unequal_numbers_of_memories_and_prompts_are_refused(icae, memory, prompts):
    with pytest.raises(
        InvalidInputError, match="there are 2 memories and 4 prompts; give a prompt for each memory, on"
    ):
        icae.generate([memory, memory], prompts, 3, return_ids=True)
    with pytest.raises(InvalidInputError, match="the list of memories is empty"):
        icae.generate([], prompts, 3, return_ids=True)


def test_restoring_several_memories_equals_one_by_one(icae, random_ids):
    """The limit of each memory is the length of its context plus 16."""
    memories = icae.compress([random_ids(n, seed=n) for n in (1, 40, 7)])
    one_by_one = [icae.restore(m, return_ids=True) for m in memories]
    assert [len(row) for row in one_by_one] == [17, 56, 23]
    assert icae.restore(memories, return_ids=True) == one_by_one
    assert icae.restore(memories[:1], 5, return_ids=True) == [one_by_one[0][:5]]


def test_restoring_by_span_restores_each_span_as_a_context(icae, random_ids):
    rows = [random_ids(n, seed=n) for n in (40, 7)]
    memories = icae.compress(rows)
    assert len(memories[0].span_lengths) > 1
    spans = [list(ids.split(m.span_lengths)) for ids, m in zip(rows, memories, strict=True)]
    for m, own in zip(memories, spans, strict=True):
        assert [x.span_lengths for x in m.spans()] == [(len(ids),) for ids in own]
        assert torch.equal(torch.cat([x.slots for x in m.spans()]), m.slots)
    free = [[icae.restore(icae.compress(ids)[0], return_ids=True) for ids in own] for own in spans]
    cut = [
        [i for ids, w in zip(own, f, strict=True) for i in w[: len(ids)]] for own, f in zip(spans, free, strict=True)
    ]
    assert icae.restore_by_span(memories, return_ids=True) == cut
    assert icae.restore_by_span(memories[0], return_ids=True) == cut[0]
    assert icae.restore_by_span(memories[0], return_ids=True, max_new_tokens=2) == [i for f in free[0] for i in f[:2]]
    # This end-of-sequence id ends one span early, and is not part of the result.
    eos = icae.base_model.generation_config.eos_token_id = free[0][1][3]
    expected = [
        w[: min(len(ids), w.index(eos) if eos in w else len(ids))] for ids, w in zip(spans[0], free[0], strict=True)
    ]
    assert icae.restore_by_span(memories[0], return_ids=True) == [i for w in expected for i in w]
    with pytest.raises(TokenizerMismatchError):
        icae.restore_by_span(memories[0])


def test_the_repetition_penalty_covers_prompt_and_answer(icae, memory):
    """Each token is the argmax of the base model's logits after the penalty is applied by hand."""
    prompt, penalty = [5, 6, 7, 8], 2.0
    answer = icae.generate(memory, prompt, 12, return_ids=True, repetition_penalty=penalty)[0]
    assert answer != icae.generate(memory, prompt, 12, return_ids=True)[0]
    v = icae.vocabulary
    row = [*torch.arange(v.first_memory, v.ae).repeat(memory.n_slots // 4), v.ft, *prompt]
    embeddings = icae.tokens_to_embeddings(torch.tensor(row + answer))
    embeddings = torch.cat((memory.slots, embeddings[memory.n_slots :]))
    with torch.no_grad():
        logits = icae.base_model(inputs_embeds=embeddings[None]).logits[0, len(row) - 1 : -1]
    for n, (scores, token) in enumerate(zip(logits, answer, strict=True)):
        seen = torch.tensor(prompt + answer[:n])
        scores[seen] = torch.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
        assert scores.argmax() == token


def test_a_streamer_that_skips_the_prompt_shows_the_whole_answer(make_icae, make_tokenizer, random_ids):
    icae = make_icae(tokenizer=make_tokenizer())
    memory = icae.compress(random_ids(10))[0]
    for skip_prompt in (True, False):
        streamer = TextIteratorStreamer(icae.tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
        answer = icae.generate(memory, "w5 w6", 8, streamer=streamer)[0]
        assert "".join(streamer) == answer != ""


def test_prompt_layouts_of_every_prompt_format(make_icae, make_tokenizer):
    chat, bare = make_tokenizer(chat_template=TEMPLATE), make_tokenizer()
    ft = make_icae().vocabulary.ft
    layouts = {
        ("plain", chat): ([], [ft, 5, 6]),
        ("v1", chat): ([], [ft, 5, 6, ft]),
        ("chat", chat): ([1, 90, 91], [ft, 5, 6, 92, 93]),
        ("chat", bare): ([], [ft, 5, 6]),
        ("chat", None): ([], [ft, 5, 6]),
    }
    for (prompt_format, tokenizer), expected in layouts.items():
        icae = make_icae(prompt_format=prompt_format, tokenizer=tokenizer)
        assert icae.prompt_ids([5, 6]) == expected
        if tokenizer is not None:
            assert icae.prompt_ids("w5 w6") == expected


@pytest.mark.parametrize("prompt_format", ["chat", "plain", "v1"])
def test_generation_reads_the_prompt_layout(make_icae, make_tokenizer, random_ids, prompt_format):
    """Each token is the argmax of the training forward over `prefix, slots, suffix`."""
    icae = make_icae(prompt_format=prompt_format, tokenizer=make_tokenizer(chat_template=TEMPLATE))
    icae.base_model.generation_config.eos_token_id = []
    context, v = random_ids(10), icae.vocabulary
    prefix, suffix = icae.prompt_ids([5, 6])
    row = [*prefix, *range(v.first_memory, v.ae), *suffix]
    answer = icae.generate(icae.compress(context)[0], [5, 6], 6, return_ids=True)[0]
    with torch.no_grad():
        logits = icae([context], [torch.tensor(row + answer)])["logits"][0]
    assert logits[len(row) - 1 : -1].argmax(-1).tolist() == answer


def test_answers_as_text_have_no_special_tokens(make_icae, make_tokenizer, random_ids):
    icae = make_icae(tokenizer=make_tokenizer(chat_template=TEMPLATE))
    memory = icae.compress(random_ids(10))[0]
    ids = icae.generate(memory, ["w5 w6", "w7"], 6, return_ids=True)
    texts = icae.generate(memory, ["w5 w6", "w7"], 6)
    assert texts == [" ".join(f"w{i}" for i in row if i > 2) for row in ids]
    assert icae.restore(memory, max_new_tokens=3) == icae.tokenizer.decode(
        icae.restore(memory, max_new_tokens=3, return_ids=True), skip_special_tokens=True
    )
    assert icae.restore_by_span(memory) == icae.tokenizer.decode(
        icae.restore_by_span(memory, return_ids=True), skip_special_tokens=True
    )


def test_a_template_that_changes_the_message_is_refused(make_icae, make_tokenizer, random_ids):
    icae = make_icae(tokenizer=make_tokenizer(chat_template="{{ messages[0]['content'] | upper }} w5"))
    memory = icae.compress(random_ids(10))[0]
    with pytest.raises(TokenizerMismatchError, match="prompt_format to 'plain'"):
        icae.generate(memory, "w5", 3)
    plain = make_icae(tokenizer=icae.tokenizer, prompt_format="plain")
    assert isinstance(plain.generate(memory, "w5", 3)[0], str)


def test_without_end_of_sequence_ids_generation_runs_to_the_limit(icae, memory, prompts):
    icae.base_model.generation_config.eos_token_id = icae.base_model.config.eos_token_id = None
    assert icae.eos_token_ids == ()
    assert len(icae.generate(memory, prompts[0], 5, min_new_tokens=2, return_ids=True)[0]) == 5


def test_restore_stops_at_the_last_position_by_default(make_icae, random_ids):
    icae = make_icae()
    memory = icae.compress(random_ids(40))[0]
    icae.max_positions = memory.n_slots + 1 + 7
    assert len(icae.restore(memory, min_new_tokens=7, return_ids=True)) == 7
