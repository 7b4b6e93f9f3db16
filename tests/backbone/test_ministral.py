"""Ministral: windowed and full layers in one model, in every path of the package against Hugging Face's forward."""

import pytest
import torch
from transformers import DynamicCache

from icae_fast.backbone.families.table import view_of
from icae_fast.backbone.rows import pack_ends
from icae_fast.generation.step_weights import step_weights
from icae_fast.kv.segments import DecoderRows
from icae_fast.step.tape import Level, backward_stack, forward_stack

pytestmark = pytest.mark.usefixtures("one_thread")
CLOSE = {"rtol": 2e-5, "atol": 2e-5}
FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.fixture
def icae(make_icae):
    """A tiny Ministral whose middle layer has full attention; the others have a window of 7 keys."""
    return make_icae("ministral")


def embeddings(n, seed=0):
    return torch.randn(n, 32, generator=torch.Generator().manual_seed(seed))


def hf_hidden(icae, x):
    return icae.base_model.model(inputs_embeds=x[None], use_cache=False).last_hidden_state[0]


def test_the_view_reads_the_configuration(make_base):
    assert [layer.window for layer in view_of(make_base("ministral"))] == [7, 0, 7]
    every = make_base("ministral", layer_types=None)  # in transformers, every layer then has the window
    assert [layer.window for layer in view_of(every)] == [7, 7, 7]
    none = make_base("ministral", layer_types=None, sliding_window=None)
    assert [layer.window for layer in view_of(none)] == [0, 0, 0]


@pytest.mark.parametrize("layers", [[FULL] * 3, [SLIDING] * 3, [SLIDING, FULL, SLIDING], [FULL, SLIDING, FULL]])
@torch.no_grad()
def test_hidden_states_equal_hugging_face(make_icae, make_base, layers):
    icae = make_icae(base=make_base("ministral", layer_types=layers))
    x = embeddings(23)
    got = icae.backbone.forward(x, pack_ends([23], [23]))
    torch.testing.assert_close(got, hf_hidden(icae, x), **CLOSE)


@torch.no_grad()
def test_the_windows_matter(icae, make_icae, make_base):
    x, rows = embeddings(23), pack_ends([23], [23])
    for layers in ([FULL] * 3, [SLIDING] * 3):
        other = make_icae(base=make_base("ministral", layer_types=layers))
        assert (icae.backbone.forward(x, rows) - other.backbone.forward(x, rows)).abs().max() > 0.05


@torch.no_grad()
def test_a_cached_prefill_and_token_steps_equal_hugging_face(icae):
    x = embeddings(12)
    rows = DecoderRows(icae.backbone, [[]], [12], icae.dtype, icae.device)
    cache, start = DynamicCache(config=icae.base_model.config), 0
    for n in (7, 1, 3, 1):
        part = x[start : start + n]
        expected = icae.base_model(inputs_embeds=part[None], past_key_values=cache, use_cache=True).logits[0, -1]
        hidden = icae.backbone.forward(part, rows.append([n]), cache=rows)
        torch.testing.assert_close(icae.base_model.lm_head(hidden)[-1], expected, **CLOSE)
        start += n


def test_decoding_takes_the_token_step_of_llama(icae, make_icae):
    assert (step_weights(icae.backbone) is None) == (step_weights(make_icae("llama").backbone) is None)


@pytest.mark.parametrize("level", [Level.HIDDEN, Level.ATTENTION, Level.ALL])
def test_the_training_steps_backward_equals_hugging_face(icae, level):
    assert icae.backbone.is_plain_stack(embeddings(1))
    x, weight = embeddings(19).requires_grad_(), embeddings(19, seed=1)
    (expected,) = torch.autograd.grad((hf_hidden(icae, x) * weight).sum(), x)
    with torch.no_grad():
        hidden, tape = forward_stack(icae.backbone, x.detach(), pack_ends([19], [19]), None, [level] * 3)
    behind = hidden.clone().requires_grad_()
    (grad,) = torch.autograd.grad((icae.backbone.final_norm(behind) * weight).sum(), behind)
    with torch.no_grad():
        got, _ = backward_stack(tape, grad)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
