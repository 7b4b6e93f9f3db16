"""Sampled answers and their streams, with a tokenizer that splits characters: every way to read an answer agrees."""

import copy
import inspect

import pytest
import torch
from tokenizers import AddedToken
from transformers import MaxLengthCriteria, MinLengthLogitsProcessor, StoppingCriteriaList

from icae_fast import Answer, TextPiece
from icae_fast.errors import InvalidInputError, NonFiniteError, TokenizerMismatchError
from icae_fast.generation.decoding import DecodeSession
from icae_fast.generation.detokenize import hidden_tokens

pytestmark = pytest.mark.usefixtures("one_thread")

HALF = "\ufffd"
PROMPTS = ["the cat", "日本", "sat on the mat", "é"]
SAMPLED = {"do_sample": True, "seed": 20, "temperature": 2.0, "max_new_tokens": 30}


@pytest.fixture(scope="module")
def icae(make_icae, make_base, byte_tokenizer):
    """A random model with byte tokens, which often writes invalid UTF-8."""
    icae = make_icae(base=make_base(vocab_size=320), tokenizer=byte_tokenizer)
    icae.base_model.generation_config.eos_token_id = []
    return icae


@pytest.fixture(scope="module")
def memory(icae):
    return icae.compress("the cat sat on the mat 😀")[0]


@pytest.fixture(scope="module")
def free(icae, memory):
    """Answers that run to their length limit."""
    answers = icae.answer(memory, PROMPTS, **SAMPLED)
    assert all(a.finish_reason == "length" and len(a.ids) == 30 for a in answers)
    assert any(HALF in a.text for a in answers)
    assert any(c > "\x7f" and c != HALF for a in answers for c in a.text)
    return answers


def decode(icae, ids):
    return icae.tokenizer.decode(ids, skip_special_tokens=True)


def test_answers_have_ids_text_and_reason(icae, memory, free):
    assert [a.text for a in free] == [decode(icae, a.ids) for a in free]
    assert icae.generate(memory, PROMPTS, **SAMPLED) == [a.text for a in free]
    assert icae.generate(memory, PROMPTS, return_ids=True, **SAMPLED) == [a.ids for a in free]
    eos = free[0].ids[12]
    assert eos > 2  # not a special token, so it has text
    ended = icae.answer(memory, PROMPTS, eos_token_id=[eos], **SAMPLED)[0]
    n = free[0].ids.index(eos) + 1
    assert ended == Answer(free[0].ids[:n], decode(icae, free[0].ids[: n - 1]), "eos")
    assert icae.answer(memory, PROMPTS[0], max_new_tokens=0) == [Answer([], "", "length")]


def test_without_a_tokenizer_answers_have_ids_and_no_text(make_icae, random_ids):
    icae = make_icae()
    memory = icae.compress(random_ids(20))[0]
    answer = icae.answer(memory, [5, 6], 4)[0]
    assert answer.text is None
    assert icae.generate(memory, [5, 6], 4, return_ids=True) == [answer.ids]
    for call in (lambda: icae.stream(memory, [5, 6]), lambda: icae.answer(memory, [5, 6], stop_strings="a")):
        with pytest.raises(TokenizerMismatchError, match="tokenizer="):
            call()


def test_a_row_samples_the_same_by_itself_and_in_a_batch(icae, memory, free):
    for i, prompt in enumerate(PROMPTS):
        alone = icae.answer(memory, prompt, **SAMPLED | {"seed": 20 + i})
        assert alone == icae.answer(memory, [prompt], **SAMPLED | {"seed": [20 + i]}) == [free[i]]
    assert icae.answer(memory, PROMPTS[::-1], **SAMPLED | {"seed": [23, 22, 21, 20]}) == free[::-1]
    assert icae.answer([memory] * 4, PROMPTS, **SAMPLED | {"max_new_tokens": 10})[2].ids == free[2].ids[:10]
    same = icae.answer(memory, PROMPTS[:1] * 4, **SAMPLED)
    assert len({tuple(a.ids) for a in same}) == 4  # the same prompt, four samples
    for eos in free[1].ids[:8]:  # rows that leave do not change those that stay
        rows = icae.generate(memory, PROMPTS, return_ids=True, eos_token_id=eos, **SAMPLED)
        assert rows == [a.ids[: a.ids.index(eos) + 1] if eos in a.ids else a.ids for a in free]


def test_streamed_text_equals_generated_text(icae, memory, free):
    for options in ({}, {"eos_token_id": free[0].ids[5]}, {"stop_strings": [free[1].text[4:6], free[2].text[9:10]]}):
        expected = icae.answer(memory, PROMPTS, **SAMPLED | options)
        pieces = list(icae.stream(memory, PROMPTS, **SAMPLED | options))
        for row, answer in enumerate(expected):
            own = [p for p in pieces if p.row == row]
            assert "".join(p.text for p in own) == answer.text
            assert [p.finish_reason for p in own] == [None] * (len(own) - 1) + [answer.finish_reason]
            assert all(p.text for p in own[:-1])


def test_the_rows_of_a_stream_advance_together(icae, memory, free):
    """A row that a stop string ends reports its end before the stream of the other row is over."""
    stop = next(c for c in free[1].text if c not in free[0].text)
    pieces = list(icae.stream(memory, PROMPTS[:2], stop_strings=stop, **SAMPLED))
    assert {p.row for p in pieces[:4]} == {0, 1}
    end = next(i for i, p in enumerate(pieces) if p == TextPiece(1, p.text, "stop"))
    assert {p.row for p in pieces[end + 1 :]} == {0}


def test_a_stream_checks_its_arguments_at_once_and_computes_lazily(icae, memory, monkeypatch):
    steps, step = [], DecodeSession.step
    monkeypatch.setattr(DecodeSession, "step", lambda self, ids: steps.append(len(ids)) or step(self, ids))
    with pytest.raises(InvalidInputError, match="no option stop"):
        icae.stream(memory, PROMPTS, stop="x")
    stream = icae.stream(memory, PROMPTS[0], **SAMPLED)
    assert next(stream).text
    n = len(steps)
    assert n < 29
    assert torch.is_grad_enabled()
    stream.close()
    assert len(steps) == n


def test_stop_strings_end_text_and_ids(icae, memory, free):
    reasons = set()
    for stop in (free[0].text[8:10], free[1].text[3:4], [free[2].text[5:9], free[3].text[2:5]], "not in any answer"):
        stops = [s for s in ([stop] if isinstance(stop, str) else stop) if HALF not in s]
        for got, whole in zip(icae.answer(memory, PROMPTS, stop_strings=stops, **SAMPLED), free, strict=True):
            texts = (decode(icae, whole.ids[:n]).rstrip(HALF) for n in range(31))
            n = next((n for n, t in enumerate(texts) if any(s in t for s in stops)), None)
            assert got.ids == whole.ids[:n]
            if n is None:
                assert got == whole
            else:
                text = decode(icae, got.ids).rstrip(HALF)
                assert got.text == text[: min(text.index(s) for s in stops if s in text)].rstrip(HALF)
            reasons.add((n is None, got.finish_reason))
    assert reasons == {(True, "length"), (False, "stop")}


def test_a_stop_string_may_not_be_a_special_token(icae, memory):
    with pytest.raises(InvalidInputError, match="'a</s>' holds the special token '</s>', which text does not show"):
        icae.generate(memory, PROMPTS, stop_strings=["a</s>"])


def test_added_special_tokens_are_hidden_from_text(byte_tokenizer):
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.add_tokens([AddedToken("<|turn|>", special=True), AddedToken("<seen>", special=False)])
    assert hidden_tokens(tokenizer) == {"<pad>", "<bos>", "</s>", "<|turn|>"}
    assert tokenizer.decode([320, 321], skip_special_tokens=True) == "<seen>"


@pytest.mark.parametrize("eos", [320, -1, "</s>", [5, "a"], 1.5])
def test_an_eos_id_outside_the_vocabulary_is_refused(icae, memory, eos):
    with pytest.raises(InvalidInputError, match=r"eos_token_id is .*; pass ids from 0 to 319"):
        icae.generate(memory, PROMPTS, eos_token_id=eos)


def test_processors_and_criteria_of_transformers_are_applied(icae, memory, free):
    longest = max(len(icae.tokenizer(p)["input_ids"]) for p in PROMPTS)
    criteria = StoppingCriteriaList([MaxLengthCriteria(longest + 6)])
    answers = icae.answer(memory, PROMPTS, stopping_criteria=criteria, **SAMPLED)
    assert [(a.ids, a.finish_reason) for a in answers] == [(a.ids[:6], "stop") for a in free]
    width = len(icae.tokenizer(PROMPTS[0])["input_ids"])
    eos, options = free[0].ids[3], SAMPLED | {"return_ids": True}
    hold = [MinLengthLogitsProcessor(width + 8, eos)]
    held = icae.generate(memory, PROMPTS[0], eos_token_id=eos, logits_processor=hold, **options)
    assert held == icae.generate(memory, PROMPTS[0], eos_token_id=eos, min_new_tokens=8, **options)
    assert eos not in held[0][:8]


def test_processors_that_exclude_every_token_raise(icae, memory):
    nothing = [lambda ids, scores: torch.full_like(scores, float("-inf"))]
    with pytest.raises(NonFiniteError, match="nothing to choose from"):
        icae.generate(memory, PROMPTS, logits_processor=nothing, **SAMPLED)


def test_restore_takes_the_same_options_as_generate(icae, memory):
    options = {"do_sample": True, "seed": 3, "max_new_tokens": 12}
    whole = icae.restore(memory, **options)
    assert icae.restore([memory, memory], **options | {"seed": [3, 3]}) == [whole] * 2
    stop = next(c for c in whole[2:] if c != HALF)
    assert icae.restore(memory, stop_strings=stop, **options) == whole[: whole.index(stop)].rstrip(HALF)


def test_the_docstring_of_writing_names_every_option():
    from icae_fast.generation import writing
    from icae_fast.generation.sampling import GenerationOptions

    for name in inspect.signature(GenerationOptions).parameters:
        assert f"`{name}`" in writing.__doc__


def test_generation_kwargs_has_a_key_for_every_option():
    from dataclasses import fields

    from icae_fast.generation.sampling import GenerationKwargs, GenerationOptions

    assert list(GenerationKwargs.__annotations__) == [f.name for f in fields(GenerationOptions)]
