"""SmolLM3: layers without RoPE, in every path of the package against Hugging Face's forward."""

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
MIXED = {"no_rope_layers": [1, 0, 1], "use_sliding_window": False}


@pytest.fixture
def icae(make_icae, make_base):
    """A tiny SmolLM3 whose middle layer has no RoPE; no layer has a window."""
    return make_icae(base=make_base("smollm3", **MIXED))


def embeddings(n, seed=0):
    return torch.randn(n, 32, generator=torch.Generator().manual_seed(seed))


def hf_hidden(icae, x):
    return icae.base_model.model(inputs_embeds=x[None], use_cache=False).last_hidden_state[0]


def test_the_view_reads_the_configuration(make_base):
    layers = list(view_of(make_base("smollm3")))
    assert [layer.rope for layer in layers] == [True, False, True]
    assert [layer.window for layer in layers] == [0, 7, 0]  # in transformers, layers without RoPE have the windows
    layers = list(
        view_of(make_base("smollm3", no_rope_layers=None, no_rope_layer_interval=2, use_sliding_window=False))
    )
    assert [layer.rope for layer in layers] == [True, False, True]
    assert [layer.window for layer in layers] == [0, 0, 0]


@pytest.mark.parametrize("rope", [[1, 1, 1], [0, 0, 0], [1, 0, 1], [0, 1, 0]])
@torch.no_grad()
def test_hidden_states_equal_hugging_face(make_icae, make_base, rope):
    icae = make_icae(base=make_base("smollm3", no_rope_layers=rope, use_sliding_window=False))
    x = embeddings(23)
    got = icae.backbone.forward(x, pack_ends([23], [23]))
    torch.testing.assert_close(got, hf_hidden(icae, x), **CLOSE)


@torch.no_grad()
def test_layers_without_rope_matter(icae, make_icae, make_base):
    x, rows = embeddings(23), pack_ends([23], [23])
    other = make_icae(base=make_base("smollm3", no_rope_layers=[1, 1, 1], use_sliding_window=False))
    assert (icae.backbone.forward(x, rows) - other.backbone.forward(x, rows)).abs().max() > 0.05


@torch.no_grad()
def test_a_cached_prefill_and_token_steps_equal_hugging_face(icae):
    x = embeddings(12)
    rows = DecoderRows(icae.backbone, [[]], [12], icae.dtype, icae.device)
    cache, start = DynamicCache(), 0
    for n in (7, 1, 3, 1):
        part = x[start : start + n]
        expected = icae.base_model(inputs_embeds=part[None], past_key_values=cache, use_cache=True).logits[0, -1]
        hidden = icae.backbone.forward(part, rows.append([n]), cache=rows)
        torch.testing.assert_close(icae.base_model.lm_head(hidden)[-1], expected, **CLOSE)
        start += n


def test_decoding_runs_layer_by_layer_unless_every_layer_has_rope(icae, make_icae, make_base):
    """`decode_step` rotates in every layer, so it must not serve a model with layers that do not."""
    assert not icae.backbone.all_rope
    assert step_weights(icae.backbone) is None
    full = make_icae(base=make_base("smollm3", no_rope_layers=[1, 1, 1], use_sliding_window=False))
    plain = make_icae("llama")
    assert full.backbone.all_rope
    assert (step_weights(full.backbone) is None) == (step_weights(plain.backbone) is None)


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
