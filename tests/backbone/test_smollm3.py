"""SmolLM3: layers without RoPE, in every path of the package against Hugging Face's forward."""

import pytest

from helpers.checks.families import check_backward, check_cached_prefill_and_steps, check_differs, check_hidden_states
from icae_fast.backbone.families.table import view_of
from icae_fast.generation.step_weights import step_weights
from icae_fast.step.tape import Level

pytestmark = pytest.mark.usefixtures("one_thread")
MIXED = {"no_rope_layers": [1, 0, 1], "use_sliding_window": False}


@pytest.fixture
def icae(make_icae, make_base):
    """A tiny SmolLM3 whose middle layer has no RoPE; no layer has a window."""
    return make_icae(base=make_base("smollm3", **MIXED))


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
def test_hidden_states_equal_hugging_face(make_icae, make_base, rope):
    icae = make_icae(base=make_base("smollm3", no_rope_layers=rope, use_sliding_window=False))
    check_hidden_states(icae)


def test_layers_without_rope_matter(icae, make_icae, make_base):
    other = make_icae(base=make_base("smollm3", no_rope_layers=[1, 1, 1], use_sliding_window=False))
    check_differs(icae, other)


def test_a_cached_prefill_and_token_steps_equal_hugging_face(icae):
    check_cached_prefill_and_steps(icae)


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
    check_backward(icae, level)
