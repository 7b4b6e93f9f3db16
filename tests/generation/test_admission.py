"""Rows of a call are admitted by a budget; answers do not depend on it."""

import pytest
import torch

from icae_fast.errors import ContextTooLongError, InvalidInputError
from icae_fast.generation import answers
from icae_fast.generation.decoding import DecodeSession

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def sessions(monkeypatch):
    """The number of rows and bytes of each session that was started."""
    seen = []
    start = DecodeSession.start

    def watch(self):
        seen.append((len(self._order), self.nbytes))
        return start(self)

    monkeypatch.setattr(DecodeSession, "start", watch)
    return seen


@pytest.fixture
def icae(make_icae):
    return make_icae()


OPTIONS = {
    "greedy": {},
    "sampled": {"do_sample": True, "seed": 7},
    "own seeds": {"do_sample": True, "seed": [(11 * i) % 37 for i in range(40)], "top_k": 20},
    "penalty": {"repetition_penalty": 1.3},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_answers_do_not_depend_on_the_budget(icae, random_ids, sessions, name):
    memory = icae.compress(random_ids(30))[0]
    prompts = [random_ids(1 + i % 5, seed=i) for i in range(40)]
    options = {"max_new_tokens": 9, "return_ids": True, **OPTIONS[name]}
    expected = icae.generate(memory, prompts, **options)
    assert len(sessions) == 1
    whole = sessions[0][1]
    sessions.clear()
    icae.decode_budget = whole // 4
    assert icae.generate(memory, prompts, **options) == expected
    assert sum(n for n, _ in sessions) == 40
    assert len(sessions) > 3
    assert max(size for _, size in sessions) <= icae.decode_budget
    sessions.clear()
    icae.decode_budget = 1
    assert icae.generate(memory, prompts, **options) == expected
    assert [n for n, _ in sessions] == [1] * 40


def test_unseeded_rows_draw_their_seeds_at_once(icae, random_ids):
    memory = icae.compress(random_ids(30))[0]
    found = []
    for budget in (1 << 30, 1):
        icae.decode_budget = budget
        torch.manual_seed(3)
        found.append(icae.generate(memory, [[5]] * 6, 8, return_ids=True, do_sample=True))
    assert found[0] == found[1]


def test_restoring_and_streaming_are_admitted_too(make_icae, make_tokenizer, random_ids, sessions):
    icae = make_icae(tokenizer=make_tokenizer())
    memories = icae.compress([random_ids(n, seed=n) for n in (5, 40, 9, 30)])
    restored = icae.restore(memories, return_ids=True), icae.restore_by_span(memories, return_ids=True)
    streamed = ["".join(p.text for p in icae.stream(memories, "w7 w8", 6) if p.row == i) for i in range(4)]
    sessions.clear()
    icae.decode_budget = 1
    assert (icae.restore(memories, return_ids=True), icae.restore_by_span(memories, return_ids=True)) == restored
    assert all(n == 1 for n, _ in sessions)
    pieces = list(icae.stream(memories, "w7 w8", 6))
    assert ["".join(p.text for p in pieces if p.row == i) for i in range(4)] == streamed
    assert sorted(p.row for p in pieces if p.finish_reason) == [0, 1, 2, 3]


def test_a_shared_memory_is_counted_once(icae, random_ids, sessions):
    """Rows about one long memory fit together where rows about as many memories do not."""
    memories = icae.compress([random_ids(200, seed=i) for i in range(8)])
    icae.generate(memories[0], [[5]], 2, return_ids=True)
    icae.decode_budget = 3 * sessions.pop()[1]
    icae.generate(memories[0], [[5]] * 8, 2, return_ids=True)
    shared = len(sessions)
    sessions.clear()
    icae.generate(memories, [[5]], 2, return_ids=True)
    assert shared < len(sessions)


def test_processors_see_all_rows(icae, random_ids, sessions):
    memory = icae.compress(random_ids(30))[0]
    rows = []
    icae.decode_budget = 1
    icae.generate(
        memory, [[5]] * 3, 2, 2, return_ids=True, logits_processor=[lambda ids, s: (rows.append(len(ids)), s)[1]]
    )
    assert rows == [3, 3]
    assert [n for n, _ in sessions] == [3]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: 9"), MemoryError()]
)
def test_running_out_of_memory_is_a_typed_error(icae, random_ids, monkeypatch, error):
    def fail(*_):
        raise error

    memory = icae.compress(random_ids(30))[0]
    monkeypatch.setattr(answers, "_session", fail)
    with pytest.raises(ContextTooLongError, match=r"while 2 rows were decoded together; set icae\.decode_budget below"):
        icae.generate(memory, [[5], [6]], 3, return_ids=True)
    monkeypatch.setattr(answers, "_session", lambda *_: (_ for _ in ()).throw(RuntimeError("another")))
    with pytest.raises(RuntimeError, match="another"):
        icae.generate(memory, [[5], [6]], 3, return_ids=True)


@pytest.mark.parametrize("value", [0, -1, 1.5, "1", None, True])
def test_a_bad_budget_is_refused(icae, value):
    with pytest.raises(InvalidInputError, match="decode_budget is"):
        icae.decode_budget = value
    assert icae.decode_budget == 4 << 30
