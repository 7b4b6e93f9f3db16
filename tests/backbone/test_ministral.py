"""Ministral: windowed and full layers in one model, in every path of the package against Hugging Face's forward."""

import pytest

from helpers.checks.families import check_backward, check_cached_prefill_and_steps, check_differs, check_hidden_states
from icae_fast.backbone.families.table import view_of
from icae_fast.generation.step_weights import step_weights
from icae_fast.step.tape import Level

pytestmark = pytest.mark.usefixtures("one_thread")
FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.fixture
def icae(make_icae):
    """A tiny Ministral whose middle layer has full attention; the others have a window of 7 keys."""
    return make_icae("ministral")


def test_the_view_reads_the_configuration(make_base):
    assert [layer.window for layer in view_of(make_base("ministral"))] == [7, 0, 7]
    every = make_base("ministral", layer_types=None)  # in transformers, every layer then has the window
    assert [layer.window for layer in view_of(every)] == [7, 7, 7]
    none = make_base("ministral", layer_types=None, sliding_window=None)
    assert [layer.window for layer in view_of(none)] == [0, 0, 0]


@pytest.mark.parametrize("layers", [[FULL] * 3, [SLIDING] * 3, [SLIDING, FULL, SLIDING], [FULL, SLIDING, FULL]])
def test_hidden_states_equal_hugging_face(make_icae, make_base, layers):
    icae = make_icae(base=make_base("ministral", layer_types=layers))
    check_hidden_states(icae)


def test_the_windows_matter(icae, make_icae, make_base):
    for layers in ([FULL] * 3, [SLIDING] * 3):
        other = make_icae(base=make_base("ministral", layer_types=layers))
        check_differs(icae, other)


def test_a_cached_prefill_and_token_steps_equal_hugging_face(icae):
    check_cached_prefill_and_steps(icae)


def test_decoding_takes_the_token_step_of_llama(icae, make_icae):
    assert (step_weights(icae.backbone) is None) == (step_weights(make_icae("llama").backbone) is None)


@pytest.mark.parametrize("level", [Level.HIDDEN, Level.ATTENTION, Level.ALL])
def test_the_training_steps_backward_equals_hugging_face(icae, level):
    check_backward(icae, level)
