"""A memory beyond what the adapter was trained with is warned of, once and where something is known."""

import warnings

import pytest
import torch

from icae_fast import ICAE, errors
from icae_fast.config import Trained

pytestmark = pytest.mark.usefixtures("one_thread")

RECORD = Trained(max_spans=2, span_tokens=16, dtype="float32")


@pytest.fixture
def icae(make_icae, make_tokenizer):
    """k = 4 and rate 4, so spans of 16 tokens, trained with two of them."""
    icae = make_icae(tokenizer=make_tokenizer())
    icae.trained = RECORD
    return icae


def silent(call):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return call()


def test_more_spans_are_warned_of_once(icae, random_ids):
    silent(lambda: icae.compress(random_ids(32)))
    with pytest.warns(errors.UntrainedSizeWarning, match=r"3 spans, and the adapter .* at most 2: .*restore_by_span"):
        long = icae.compress(random_ids(48))
    silent(lambda: icae.compress(random_ids(48)))
    silent(lambda: icae.generate(long, [random_ids(3)], return_ids=True, max_new_tokens=1))


@pytest.mark.parametrize("call", ["generate", "answer", "stream", "restore", "extend"])
def test_every_reader_warns(icae, random_ids, call):
    (memory,) = ICAE.from_base(icae.base_model, icae.config).compress(random_ids(48))
    read = {
        "generate": lambda: icae.generate(memory, [random_ids(3)], return_ids=True, max_new_tokens=1),
        "answer": lambda: icae.answer(memory, [random_ids(3)], max_new_tokens=1),
        "stream": lambda: list(icae.stream(memory, [random_ids(3)], max_new_tokens=1)),
        "restore": lambda: icae.restore(memory, return_ids=True, max_new_tokens=1),
        "extend": lambda: icae.extend(memory, random_ids(3)),
    }
    with pytest.warns(errors.UntrainedSizeWarning, match="spans, and the adapter was trained with at most 2"):
        read[call]()


def test_restoring_by_span_reads_no_more_than_one(icae, random_ids):
    (memory,) = ICAE.from_base(icae.base_model, icae.config).compress(random_ids(48))
    silent(lambda: icae.restore_by_span(memory, return_ids=True))


def test_longer_spans_are_warned_of(icae, make_base, tmp_path, random_ids):
    icae.save_pretrained(tmp_path)
    wide = ICAE.from_pretrained(tmp_path, make_base(), compression_rate=8)
    silent(lambda: wide.compress(random_ids(16)))
    with pytest.warns(
        errors.UntrainedSizeWarning, match=r"span has 32 tokens, .* at most 16: .*lower compression_rate"
    ):
        wide.compress(random_ids(32))


def test_nothing_is_said_where_nothing_is_known(make_icae, make_base, random_ids, tmp_path):
    icae = make_icae()
    icae.save_pretrained(tmp_path)
    again = ICAE.from_pretrained(tmp_path, make_base())
    assert again.trained is None
    silent(lambda: again.compress(random_ids(100)))


def test_the_record_is_saved_with_the_adapter(icae, make_base, tmp_path):
    icae.save_pretrained(tmp_path)
    again = ICAE.from_pretrained(tmp_path, make_base())
    assert again.trained == RECORD
    assert again.with_memory_size(2).trained == RECORD


@pytest.mark.parametrize("record", [7, [], {"max_spans": 2}, RECORD.to_dict() | {"max_spans": 0}])
def test_a_damaged_record(icae, make_base, tmp_path, record, monkeypatch):
    monkeypatch.setattr(Trained, "to_dict", lambda self: record)
    icae.save_pretrained(tmp_path)
    monkeypatch.undo()
    with pytest.raises(errors.CheckpointError, match=r"icae_config.json"):
        ICAE.from_pretrained(tmp_path, make_base())


def test_a_record_of_a_later_version(icae, make_base, tmp_path, monkeypatch):
    monkeypatch.setattr(Trained, "to_dict", lambda self: {"max_spans": 2, "span_tokens": 16, "dtype": "x", "more": 1})
    icae.save_pretrained(tmp_path)
    assert ICAE.from_pretrained(tmp_path, make_base()).trained == Trained(2, 16, "x")


def test_a_training_that_goes_on_keeps_the_larger_sizes():
    assert Trained(1, 64, "bfloat16").joined(RECORD) == Trained(2, 64, "bfloat16")
    assert RECORD.joined(None) == RECORD


def test_slots_do_not_depend_on_the_record(icae, make_icae, random_ids):
    with pytest.warns(errors.UntrainedSizeWarning):
        warned = icae.compress(random_ids(48))[0].slots
    assert torch.equal(warned, make_icae().compress(random_ids(48))[0].slots)
