"""Token choice: distributions, seeds, the order of processors as in transformers, and options out of range."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from icae_fast.errors import InvalidInputError
from icae_fast.generation.sampling import GenerationOptions, TokenChooser

pytestmark = pytest.mark.usefixtures("one_thread")

V = 8
LOGITS = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -30.0])
# A chi-square variable with 1 to 7 degrees of freedom exceeds this with probability 1.0e-4 at most (df = 7).
CHI_SQUARE_LIMIT = 29.9


def chooser(n_rows=1, max_new_tokens=1, prompts=None, min_new_tokens=0, eos=(), **options):
    prompts = prompts or [[]] * n_rows
    options = GenerationOptions(**options)
    return TokenChooser(options, prompts, max_new_tokens, min_new_tokens, eos, V, torch.device("cpu"))


def chi_square(tokens, probabilities):
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    expected = probabilities.double() * len(tokens)
    assert counts[expected == 0].sum() == 0
    likely = expected > 5
    rest = ~likely
    statistic = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    if expected[rest].sum() > 5:
        statistic += (counts[rest].sum() - expected[rest].sum()) ** 2 / expected[rest].sum()
    return statistic.item()


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2])
def test_draws_follow_the_distribution(temperature):
    """Check the draws of many rows with consecutive seeds, and of many steps of one row."""
    n, expected = 20000, (LOGITS / temperature).softmax(0)
    options = {"do_sample": True, "seed": 5, "temperature": temperature}
    over_rows = chooser(n, **options).choose(LOGITS.repeat(n, 1))
    assert chi_square(over_rows, expected) < CHI_SQUARE_LIMIT
    row = chooser(1, n, **options)
    over_steps = torch.cat([row.choose(LOGITS[None].clone()) for _ in range(n)])
    assert chi_square(over_steps, expected) < CHI_SQUARE_LIMIT
    both = torch.bincount(over_steps[:-1] * V + over_steps[1:], minlength=V * V)  # pairs of consecutive draws
    table = both.view(V, V)[:6, :6].double() / n
    torch.testing.assert_close(table, torch.outer(expected, expected)[:6, :6].double(), atol=0.012, rtol=0)


@pytest.mark.parametrize(
    ("options", "warper"),
    [
        ({"top_k": 3}, TopKLogitsWarper(3)),
        ({"top_p": 0.7}, TopPLogitsWarper(0.7)),
        ({"top_p": 0.05}, TopPLogitsWarper(0.05)),
    ],
)
def test_top_k_and_top_p_match_transformers(options, warper):
    n, expected = 20000, warper(None, LOGITS[None])[0].softmax(0)
    assert 0 < (expected == 0).sum() < V
    tokens = chooser(n, do_sample=True, seed=1, **options).choose(LOGITS.repeat(n, 1))
    assert chi_square(tokens, expected) < CHI_SQUARE_LIMIT
    assert set(tokens.tolist()) == set(expected.nonzero()[:, 0].tolist())


@given(
    logits=st.lists(st.floats(-20, 20, width=32), min_size=V, max_size=V),
    top_k=st.integers(0, V + 1), top_p=st.floats(0.01, 1), temperature=st.floats(0.1, 5), seed=st.integers(0, 2**62),
)  # fmt: skip
def test_filtered_tokens_are_never_drawn(logits, top_k, top_p, temperature, seed):
    scores = torch.tensor([logits]) / temperature
    scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    # With tied scores, transformers' top-k keeps more than k tokens, and its top-p an arbitrary one of these.
    least = scores[0][TopPLogitsWarper(top_p)(None, scores)[0] > float("-inf")].min()
    allowed = torch.tensor(logits) / temperature >= least
    options = {"top_k": top_k, "top_p": top_p, "temperature": temperature, "seed": seed, "do_sample": True}
    tokens = chooser(50, **options).choose(torch.tensor([logits]).repeat(50, 1))
    assert allowed[tokens].all()


def test_draws_at_both_ends_of_the_distribution_skip_impossible_tokens(monkeypatch):
    monkeypatch.setattr(
        "icae_fast.generation.sampling._uniform", lambda seeds, n: torch.full((1, n), 1 - 2.0**-53).double()
    )
    logits = torch.tensor([[1.0, 2.0, 3.0, float("-inf")]])
    assert chooser(do_sample=True).choose(logits).item() == 2
    monkeypatch.setattr("icae_fast.generation.sampling._uniform", lambda seeds, n: torch.zeros(1, n).double())
    assert chooser(do_sample=True).choose(logits.flip(1)).item() == 1


def test_unlikely_tokens_are_not_lost_to_rounding(monkeypatch):
    """Share 1 % of the mass among 100 000 tokens, so that each has about the resolution of fp32 near 1."""
    n, rest, u = 100_000, 0.01, 0.995
    logits = torch.full((1, n + 1), rest / n).log()
    logits[0, 0] = 0.0
    monkeypatch.setattr("icae_fast.generation.sampling._uniform", lambda seeds, n: torch.full((1, n), u).double())
    expected = (u * (1 + rest) - 1) / (rest / n)
    assert abs(chooser(do_sample=True).choose(logits).item() - expected) < n * 1e-4


def test_a_row_draws_the_same_in_any_batch_and_after_other_rows_have_left():
    steps = [torch.randn(3, V, generator=torch.Generator().manual_seed(s)) for s in range(30)]
    batch = chooser(3, 30, do_sample=True, seed=11)
    rows = [[], [], []]
    active = [0, 1, 2]
    for n, logits in enumerate(steps):
        for row, token in zip(active, batch.choose(logits[active]).tolist(), strict=True):
            rows[row].append(token)
        if n in (4, 9):
            batch.keep([1] if n == 9 else [0, 2])
            active = [2] if n == 9 else [0, 2]
    assert [len(r) for r in rows] == [10, 5, 30]
    for row, expected in enumerate(rows):
        alone = chooser(1, 64, do_sample=True, seed=[11 + row])
        assert [alone.choose(logits[[row]]).item() for logits in steps[: len(expected)]] == expected
    other = chooser(1, 30, do_sample=True, seed=12 + 2)
    assert [other.choose(logits[[2]]).item() for logits in steps] != rows[2]


def test_without_a_seed_torchs_global_generator_is_used():
    def draw():
        return chooser(50, do_sample=True).choose(LOGITS.repeat(50, 1)).tolist()

    with torch.random.fork_rng():
        torch.manual_seed(3)
        first, second = draw(), draw()
        torch.manual_seed(3)
        assert draw() == first
    assert first != second


def test_min_new_tokens_forbids_end_of_sequence_ids():
    tokens = chooser(1, 4, min_new_tokens=2, eos=(0, 1))
    assert [tokens.choose(LOGITS[None].clone()).item() for _ in range(4)] == [2, 2, 0, 0]
    bf16 = chooser(1, 4, min_new_tokens=1, eos=(0,))
    assert [bf16.choose(LOGITS[None].bfloat16()).item() for _ in range(2)] == [1, 0]


def test_the_repetition_penalty_of_each_row_matches_transformers():
    """The rows' lengths differ: padding must not count as a repeated token."""
    prompts, penalty = [[0, 2], [], [5, 5, 1]], 1.7
    batch = chooser(prompts=prompts, max_new_tokens=12, repetition_penalty=penalty)
    generator, rows = torch.Generator().manual_seed(0), [list(p) for p in prompts]
    for step in range(12):
        logits = torch.randn(3, V, generator=generator)
        active = [0, 1, 2] if step < 6 else [0, 2]
        expected = [
            RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([rows[r]], dtype=torch.int64), logits[[r]]).argmax()
            for r in active
        ]
        tokens = batch.choose(logits[active]).tolist()
        assert tokens == [t.item() for t in expected]
        for row, token in zip(active, tokens, strict=True):
            rows[row].append(token)
        if step == 5:
            batch.keep([0, 2])


def test_processors_and_criteria_see_every_row_in_each_call():
    calls, scores_seen = [], []

    def watch(ids, scores):
        calls.append(ids.tolist())
        scores_seen.append(scores.clone())
        return scores.flip(1)

    def criterion(ids, scores):
        assert scores is None
        return ids[:, -1] == V - 1

    batch = chooser(prompts=[[1], [2, 3]], max_new_tokens=3, logits_processor=[watch], stopping_criteria=[criterion])
    logits = torch.arange(2.0 * V).view(2, V)
    assert batch.choose(logits).tolist() == [0, 0]
    assert batch.stopped() == [False, False]
    batch.keep([1])
    assert batch.choose(-logits[1:]).tolist() == [V - 1]
    assert batch.stopped() == [True]
    assert calls == [[[V, 1], [2, 3]], [[V, 1, 0], [2, 3, 0]]]
    assert torch.equal(scores_seen[1], torch.stack((torch.zeros(V), -logits[1])))


class ForbidHostReads(TorchDispatchMode):
    """A mode that raises where a value is read from a tensor, which would synchronise with a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal):
            raise AssertionError(f"{func} reads a value back")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "seed": 0, "temperature": 0.8, "top_k": 5, "top_p": 0.9}])
def test_choosing_reads_no_value_back_from_the_device(sampling):
    with ForbidHostReads(), pytest.raises(AssertionError, match="reads a value back"):
        LOGITS[0].item()
    tokens = chooser(
        prompts=[[1, 2], [3]], max_new_tokens=4, min_new_tokens=1, eos=(0,), repetition_penalty=1.3,
        logits_processor=[lambda ids, scores: scores * 2], **sampling,
    )  # fmt: skip
    with ForbidHostReads():
        tokens.choose(LOGITS.repeat(2, 1))
        tokens.keep([1])
        tokens.choose(LOGITS[None].clone())
        assert tokens.stopped() == [False]


def test_a_row_without_a_token_to_draw_gets_an_id_past_the_vocabulary():
    for hopeless in (float("-inf"), float("nan")):
        for top_k in (0, 3):
            rows = torch.stack((LOGITS, torch.full((V,), hopeless)))
            tokens = chooser(2, do_sample=True, seed=0, top_k=top_k).choose(rows)
            assert tokens[0] < V
            assert tokens[1] == V


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"temperature": 0, "do_sample": True},
            "temperature is 0; pass a number above 0; for greedy .* leave do_sample out",
        ),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": True}, "temperature is True"),
        ({"repetition_penalty": -1.0}, "repetition_penalty is -1.0; pass a number above 0"),
        ({"top_p": 0.0, "do_sample": True}, "top_p is 0.0; pass a number above 0 and at most 1"),
        ({"top_p": 1.5, "do_sample": True}, "top_p is 1.5"),
        ({"top_k": -1, "do_sample": True}, r"top_k is -1; pass an integer of at least 0 \(0 for all tokens\)"),
        ({"top_k": 2.5, "do_sample": True}, "top_k is 2.5"),
        ({"temperature": 0.7, "top_p": 0.9}, "no effect without sampling: temperature, top_p; pass do_sample=True"),
        ({"seed": 0}, "no effect without sampling: seed;"),
        ({"stop_strings": ""}, "stop_strings is ''; pass one string or several, none of them empty"),
        ({"stop_strings": ["a", 5]}, "stop_strings is"),
        ({"stop_strings": 5}, "stop_strings is 5"),
        ({"logits_processor": TopKLogitsWarper(3)}, "logits_processor is of type TopKLogitsWarper; pass a list"),
        ({"stopping_criteria": [5]}, "stopping_criteria is of type list; pass a list of callables"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(InvalidInputError, match=message):
        GenerationOptions(**options)


def test_numpy_numbers_are_accepted_as_options():
    numbers = {"seed": np.int64(3), "top_k": np.int32(4), "temperature": np.float32(1.5), "top_p": np.float64(0.9)}
    plain = {"seed": 3, "top_k": 4, "temperature": 1.5, "top_p": 0.9}
    first, second = (chooser(9, do_sample=True, **o).choose(LOGITS.repeat(9, 1)) for o in (numbers, plain))
    assert torch.equal(first, second)
    assert GenerationOptions(eos_token_id=np.int64(5)).eos_ids((), V) == (5,)


def test_bad_seeds_and_unknown_options_are_refused():
    with pytest.raises(InvalidInputError, match="there are 3 seeds for 2 rows; pass one seed, or one per row"):
        chooser(2, do_sample=True, seed=[1, 2, 3])
    for seed in (-1, 2**63, [1, "a"], [0.5, 1]):
        with pytest.raises(InvalidInputError, match=r"pass integers from 0 to 2\*\*63 - 1"):
            chooser(2, do_sample=True, seed=seed)
    with pytest.raises(
        InvalidInputError, match=r"there is no option num_beams, topk; .* do_sample, temperature, top_k"
    ):
        GenerationOptions.of({"topk": 5, "num_beams": 2, "do_sample": True})
