"""Plans of shared-prefix attention on CUDA: every query reads every key of its row once, in separate slots."""

import pytest
import torch

from icae_fast.ops.shared_prefix_attention.plan import Shape, kept, plan, sources

CPU = torch.device("cpu")


def shape(queries, lengths=(), prefix_rows=(), capacity=0, group=3, multiprocessors=132):
    starts = [sum(queries[:r]) for r in range(len(queries) + 1)]
    return Shape(tuple(starts), tuple(lengths), tuple(prefix_rows), capacity, group, 2, multiprocessors, True)


TREE = shape([1] * 7, [5, 130, 64, 31, 300], [0, 7, 0, 4, 0, 2, 2, 4, 4, 7])
SHAPES = [
    TREE,
    shape([3, 0, 40], [300, 0, 20, 700], [0, 3, 0, 3, 0, 3, 2, 3]),
    shape([1] * 50, [128] * 8, [0, 50] * 8, capacity=50 * 400),
    shape([1, 1, 1], [33], [1, 2]),
    shape([1], capacity=5000, group=1),
    shape([2, 2], [40, 50], [0, 1, 1, 2], multiprocessors=1),
]


@pytest.mark.parametrize("wanted", SHAPES, ids=range(len(SHAPES)))
def test_every_query_meets_every_key_once(wanted):
    made = plan(wanted, CPU, 64)
    met: dict = {}
    for begin, end, first, piece, last, slot, tail, split in made.items.tolist():
        for flat in range(first, min(first + made.block_m, (end - begin) * made.group)):
            query = begin + flat // made.group, flat % made.group
            slots, keys, splits = met.setdefault(query, (set(), [], []))
            assert slot not in slots
            assert slot < made.slots
            slots.add(slot)
            if tail >= 0:
                splits.append((tail, split))
            else:
                parts = made.pieces[piece:last].tolist()
                keys += [(place + i, source) for source, b, e, place in parts for i in range(b, e)]
    for row in range(wanted.n_rows):
        read = [
            source for source, n in enumerate(wanted.lengths)
            if wanted.prefix_rows[2 * source] <= row < wanted.prefix_rows[2 * source + 1] for _ in range(n)
        ]  # fmt: skip
        for query in range(wanted.starts[row], wanted.starts[row + 1]):
            for head in range(wanted.group):
                _, keys, splits = met.pop((query, head))
                assert sorted(keys) == list(enumerate(read))
                assert sorted(splits) == [(row, i) for i in range(made.tail_splits)]
    assert not met


def test_neighbouring_segments_are_read_in_one_go():
    made = plan(shape([1] * 4, [128] * 8, [0, 4] * 8, multiprocessors=1), CPU, 64)
    assert made.slots == made.tail_splits + 1
    assert len(made.pieces) == 8 + 1  # and one for the tails


def test_places_are_those_of_the_last_queries_of_a_row():
    made = plan(shape([2, 1], [5, 4], [0, 2, 1, 2]), CPU, 64)
    assert made.places.tolist() == [[0, 0, 1], [3, 4, 8]]  # position minus the tail's length: 5 - 2, 5 - 1, 9 - 1


def test_tables_are_made_once_and_kept_on_demand():
    layout = ((1, 2, 3, 4, 5, 6, 7, 8),)
    with kept() as tables:
        assert plan(TREE, CPU, 64) is plan(TREE, CPU, 64)
        assert sources(layout, CPU) is sources(layout, CPU)
    assert len(tables) == 4
    sources(layout, CPU)
    assert len(tables) == 4
