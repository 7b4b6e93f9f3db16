"""RoPE types whose angles depend on a row's length: a row never depends on those beside it, or on earlier calls."""

import pytest
import torch

from icae_fast.errors import ContextTooLongError, UnsupportedModelError

pytestmark = pytest.mark.usefixtures("one_thread")
LIMIT = 64
ROPE = {
    "dynamic": {
        "max_position_embeddings": LIMIT,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    },
    "longrope": {
        "max_position_embeddings": 4 * LIMIT,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": LIMIT,
            "short_factor": [1.0, 1.1, 1.3, 1.5], "long_factor": [2.0, 3.0, 4.0, 5.0],
        },
    },
}  # fmt: skip


@pytest.fixture(params=ROPE)
def icae(make_base, make_icae, request):
    return make_icae(base=make_base(**ROPE[request.param]))


def test_a_row_depends_on_no_other(icae, random_ids):
    assert icae.max_positions == LIMIT
    short, long = random_ids(9), random_ids(200, seed=1)
    memory = icae.compress(short)[0]
    asked = [[5, 6], [7, 8] * 20]
    alone = [icae.generate(memory, p, 6, 6, return_ids=True)[0] for p in asked]
    icae.clear_kv()
    with torch.no_grad():  # the base model's own rotary table grows with its inputs
        icae.base_model(random_ids(120)[None])
    both = icae.compress([short, long])
    torch.testing.assert_close(both[0].slots, memory.slots, rtol=1e-5, atol=3e-5)
    assert icae.generate(memory, asked, 6, 6, return_ids=True) == alone


def test_logits_equal_the_base_models(icae, random_ids):
    v, ids = icae.vocabulary, random_ids(9)
    row = torch.cat((torch.arange(v.first_memory, v.ae), torch.tensor([v.ae]), random_ids(40)))
    with torch.no_grad():
        logits = icae([ids], [row])["logits"]
        embeddings = icae.tokens_to_embeddings(row)
        embeddings[:4] = icae.encode([ids])[0]
        expected = icae.base_model(inputs_embeds=embeddings[None]).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_rows_beyond_the_limit_are_refused(icae, random_ids):
    memory = icae.compress(random_ids(9))[0]
    with pytest.raises(ContextTooLongError, match="the base model has 64"):
        icae.generate(memory, random_ids(60), 10, return_ids=True)
    icae.max_positions = 200
    for call in (
        lambda: icae.generate(memory, random_ids(70), 5, return_ids=True),
        lambda: icae.generate(memory, random_ids(50), 30, return_ids=True),
    ):
        with pytest.raises(UnsupportedModelError, match="depends on a row's length beyond 64"):
            call()
