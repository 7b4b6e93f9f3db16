"""`MemoryStore.compress` keeps what it has computed, and a bad context stops no other."""

import logging
import pickle

import pytest
import torch

from helpers.store import count_compressed, file_of
from icae_fast import MemoryStore, errors
from icae_fast.core.compress import context_batches
from icae_fast.store import compressing

GOOD = [[5, 6, 7], [8] * 20, [9, 10] * 6, [11] * 30]


@pytest.fixture
def opened(tmp_path, make_icae):
    with MemoryStore(tmp_path / "store", make_icae()) as store:
        yield store


def test_batches_are_stored_when_they_are_done(opened, monkeypatch):
    compress, calls = compressing.compress_cut, []

    def fail_later(core, cuts, **options):
        calls.append(len(opened))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compress(core, cuts, **options)

    monkeypatch.setattr(compressing, "compress_cut", fail_later)
    with pytest.raises(KeyboardInterrupt):
        opened.compress(GOOD, token_budget=24)
    assert calls == [0, 1, 2]
    monkeypatch.undo()
    counted = count_compressed(monkeypatch)
    memories = opened.compress(GOOD, token_budget=24)
    assert sum(counted) == 2
    for memory, context in zip(memories, GOOD, strict=True):
        assert torch.allclose(memory.slots, opened.icae.compress([context])[0].slots, atol=1e-5)
        assert memory.slots.untyped_storage().nbytes() == memory.nbytes


def test_batches_are_micro_batches_of_contexts(opened):
    cuts = [opened.icae.cut_context(context) for context in GOOD]
    assert [len(c.ids) + 4 * len(c.span_lengths) for c in cuts] == [7, 28, 16, 38]
    assert [list(b) for b in context_batches(opened.icae, cuts, 35)] == [[0, 1], [2], [3]]
    assert [list(b) for b in context_batches(opened.icae, cuts, 1)] == [[0], [1], [2], [3]]


@pytest.mark.parametrize("kv", [False, True])
def test_bad_contexts_are_named_and_stop_no_other(opened, kv):
    opened.icae.max_positions = 80
    contexts = [GOOD[0], [], GOOD[1], [95, 96], GOOD[0]]
    names = ["a.txt", "b.txt", "c.txt", "d.txt", "e.txt"]
    with pytest.raises(errors.SomeFailedError, match=r"2 of 5 contexts .* b\.txt is empty.*; d\.txt holds") as caught:
        opened.compress(contexts, names=names, kv=kv)
    error = caught.value
    assert isinstance(error, errors.InvalidInputError)
    assert sorted(error.failures) == [1, 3]
    assert all(isinstance(e, errors.InvalidInputError) for e in error.failures.values())
    assert [memory is None for memory in error.memories] == [False, True, False, True, False]
    assert len(opened) == 2
    for place in (0, 2, 4):
        assert torch.equal(error.memories[place].slots, opened.get(opened.key_of(contexts[place])).slots)
        assert (opened.get_kv(opened.key_of(contexts[place])) is not None) == kv
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert sorted(again.failures) == [1, 3]


def test_if_nothing_can_be_compressed_the_error_is_its_own(opened):
    with pytest.raises(errors.InvalidInputError, match="context 0 is empty") as caught:
        opened.compress([""])
    assert not isinstance(caught.value, errors.SomeFailedError)
    with pytest.raises(errors.TokenizerMismatchError):
        opened.compress(["text", "more"])
    with pytest.raises(errors.InvalidInputError, match="1 names for 2 contexts"):
        opened.compress(GOOD[:2], names=["a"])


def test_memory_that_runs_out_for_one_batch_stops_no_other(opened, monkeypatch):
    compress = compressing.compress_cut

    def fail_once(core, cuts, **options):
        if len(cuts[0].ids) == 20:
            raise errors.ContextTooLongError("memory ran out")
        return compress(core, cuts, **options)

    monkeypatch.setattr(compressing, "compress_cut", fail_once)
    with pytest.raises(errors.SomeFailedError, match="1 of 4") as caught:
        opened.compress(GOOD, token_budget=1)
    assert list(caught.value.failures) == [1]
    assert len(opened) == 3


def test_a_damaged_entry_is_compressed_again(opened, caplog):
    memory = opened.compress(GOOD[:1])[0]
    path = file_of(opened)
    path.write_bytes(path.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        again = opened.compress(GOOD[:1])[0]
    assert "context 0 is compressed again: entry" in caplog.text
    assert torch.equal(again.slots, memory.slots)
    assert torch.equal(opened.get(opened.key_of(GOOD[0])).slots, memory.slots)


def test_each_context_is_yielded_when_it_is_done(opened):
    opened.compress(GOOD[1:2])
    done = []
    progress = []
    for result in opened.compress_each([*GOOD, []], token_budget=1, on_progress=lambda *n: progress.append(n)):
        assert result.memory is None or result.key in opened
        done.append((result.place, result.error is None))
    assert done == [(1, True), (4, False), (0, True), (2, True), (3, True)]
    assert progress[-1] == (45, 45)
    assert [n for n, _ in progress] == sorted(n for n, _ in progress)
