"""A memory owns its slots: no copy, pickle or reference of it holds those of another document."""

import copy
import io
import pickle

import pytest
import torch

from icae_fast import Memory
from icae_fast.core.memory import SlotKV
from icae_fast.store.memory_file import load_memory, save_memory


def saved(value):
    torch.save(value, file := io.BytesIO())
    return file.getvalue()


@pytest.fixture(scope="module")
def memories(tiny_icae, random_ids):
    """Memories of 1, 3 and 40 spans made in one call, whose spans share micro-batches."""
    return tiny_icae.compress([random_ids(n, seed=n) for n in (9, 40, 640)], token_budget=64)


def test_memories_of_a_call_have_a_storage_each(memories, tiny_icae, random_ids):
    assert [len(m.span_lengths) for m in memories] == [1, 3, 40]
    for m in memories:
        assert m.slots.untyped_storage().nbytes() == m.nbytes
    with torch.no_grad():
        for slots in tiny_icae.encode([random_ids(9), random_ids(40)]):
            assert slots.untyped_storage().nbytes() == slots.nbytes


@pytest.mark.parametrize("dump", [pickle.dumps, saved])
def test_pickles_hold_one_memory(memories, dump):
    one, many = len(dump(memories[0])), len(dump(memories[2]))
    assert many - one == pytest.approx(memories[2].nbytes - memories[0].nbytes, rel=0.05)
    everything = b"".join(bytes(m.slots.numpy().data) for m in memories[1:])
    assert everything[:256] not in dump(memories[0])


def test_views_are_copied_where_they_are_handed_on(memories):
    """Slots of a mapped file are a view of the file; so are a user's slices."""
    part = Memory(memories[2].slots[4:8], 16, (16,))
    for again in (copy.deepcopy(part), pickle.loads(pickle.dumps(part)), *part.spans()):
        assert torch.equal(again.slots, part.slots)
        assert again.span_lengths == (16,)
        assert again.slots.untyped_storage().nbytes() == part.nbytes
    for span in memories[1].spans():
        assert span.slots.untyped_storage().nbytes() == span.nbytes


def test_a_mapped_memory_pickles_its_slots_only(memories, tiny_icae, tmp_path):
    path = tmp_path / "m.icae"
    save_memory(path, memories[0], tiny_icae)
    loaded = load_memory(path, tiny_icae)
    assert len(pickle.dumps(loaded)) == len(pickle.dumps(memories[0]))


def test_keys_and_values_pickle_their_own(tiny_icae, memories):
    kv = tiny_icae.memory_kv(memories[2])
    part = SlotKV(kv.keys[:, 8:12], kv.values[:, 8:12], kv.prefix_ids)
    again = pickle.loads(pickle.dumps(part))
    assert torch.equal(again.keys, part.keys)
    assert torch.equal(again.values, part.values)
    assert again.keys.untyped_storage().nbytes() == part.keys.nbytes
    assert (part == again) is False


def test_a_memory_equals_itself_only(memories):
    first, second = memories[:2]
    assert (first == first) is True
    assert (first == second) is False
    assert (first != copy.deepcopy(first)) is True
    assert (first == "text") is False
    assert {first: 1, second: 2}[second] == 2
    assert first in memories
    assert memories.index(second) == 1
