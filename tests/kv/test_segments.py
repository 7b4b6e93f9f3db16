"""Segments of memories, and decoder rows that continue behind segments."""

import pytest
import torch

from helpers.kv import assert_path, hf_path
from icae_fast.generation.memory_kv import memory_pieces
from icae_fast.kv.segments import DecoderRows

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def icae(make_icae):
    return make_icae()


def test_rows_keep_their_own_keys_when_others_leave(icae, make_pieces):
    """Append tokens to three rows, drop the middle one, and compare keys and values of the remaining rows."""
    a, b, *_ = icae.slot_kv.path(make_pieces())
    rows = DecoderRows(icae.backbone, [[a], [a, b], []], [4, 2, 3], icae.dtype, icae.device)
    assert rows.nbytes == rows.keys.nbytes + rows.values.nbytes + a.nbytes + b.nbytes
    x = icae.embed(torch.arange(3, 9))
    layout = rows.append([3, 1, 2])
    assert layout.positions.tolist() == [a.length, a.length + 1, a.length + 2, a.length + b.length, 0, 1]
    icae.backbone.forward(x, layout, cache=rows)
    before = [rows.tail(i) for i in range(3)]
    rows.keep([0, 2])
    for (keys, values), place in zip((before[0], before[2]), (0, 1), strict=True):
        assert torch.equal(rows.tail(place)[0], keys)
        assert torch.equal(rows.tail(place)[1], values)
    assert rows.shared.rows == ((0, 1),)
    with pytest.raises(ValueError, match="exceeds its capacity"):
        rows.append([2, 1])


def test_the_pieces_of_a_memory_are_the_template_and_its_spans(icae, random_ids):
    memory = icae.compress(random_ids(40))[0]
    template, *spans = memory_pieces(icae, memory, [7, 8])
    assert torch.equal(template, icae.embed(torch.tensor([7, 8])))
    assert [len(s) for s in spans] == [4, 4, 4]
    assert torch.equal(torch.cat(spans), memory.slots)
    assert len(memory_pieces(icae, memory)) == 3
    assert memory_pieces(icae, memory.to(torch.bfloat16))[0].dtype == torch.float32


def test_a_second_question_computes_no_slot_again(icae, random_ids, count_tokens):
    icae.base_model.generation_config.eos_token_id = []
    memory = icae.compress(random_ids(40))[0]
    calls = count_tokens(icae)
    first = icae.generate(memory, [[5, 6]], 3, return_ids=True)
    assert calls == [12, 3, 1, 1]
    icae.generate(memory, [[7], [8, 9]], 1, return_ids=True)
    icae.restore(memory, 1, return_ids=True)
    assert calls[4:] == [2 + 3, 1]
    icae.kv_budget = 0
    assert icae.generate(memory, [[5, 6]], 3, return_ids=True) == first
    assert calls[6:] == [12, 3, 1, 1]


def test_an_extended_memory_computes_only_its_new_span(icae, random_ids, count_tokens):
    memory = icae.compress(random_ids(32))[0]
    before = icae.slot_kv.path(memory_pieces(icae, memory))
    longer = icae.extend(memory, random_ids(9, seed=1))
    calls = count_tokens(icae)
    after = icae.slot_kv.path(memory_pieces(icae, longer))
    assert calls == [4]
    assert after[:2] == before
    assert (after[2].start, after[2].length) == (8, 4)
    pieces = memory_pieces(icae, longer)
    assert_path(after, pieces, hf_path(icae.base_model, pieces))


def test_memories_share_the_segment_of_the_template(icae, random_ids, count_tokens):
    memories = icae.compress([random_ids(16), random_ids(30, seed=1)])
    calls = count_tokens(icae)
    paths = icae.slot_kv.paths([memory_pieces(icae, m, [7, 8, 9]) for m in memories])
    assert calls == [3 + 4 + 8]
    assert paths[0][0] is paths[1][0]
