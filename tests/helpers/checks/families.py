"""Checks of a model family's stack against Hugging Face's forward."""

import torch
from transformers import DynamicCache

from icae_fast.backbone.rows import pack_ends
from icae_fast.kv.segments import DecoderRows
from icae_fast.step.tape import backward_stack, forward_stack

CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def embeddings(n, seed=0):
    """Return random embeddings (n, 32)."""
    return torch.randn(n, 32, generator=torch.Generator().manual_seed(seed))


def hf_hidden(icae, x):
    """Return the base model's hidden states (n, d) of embeddings."""
    return icae.base_model.model(inputs_embeds=x[None], use_cache=False).last_hidden_state[0]


@torch.no_grad()
def check_hidden_states(icae):
    """Compare all hidden states of one row."""
    x = embeddings(23)
    torch.testing.assert_close(icae.backbone.forward(x, pack_ends([23], [23])), hf_hidden(icae, x), **CLOSE)


@torch.no_grad()
def check_differs(icae, other):
    """Check that two models of the same weights compute different hidden states."""
    x, rows = embeddings(23), pack_ends([23], [23])
    assert (icae.backbone.forward(x, rows) - other.backbone.forward(x, rows)).abs().max() > 0.05


@torch.no_grad()
def check_cached_prefill_and_steps(icae):
    """Compare the logits of a prefill, of a longer part behind it, and of token steps."""
    x = embeddings(12)
    rows = DecoderRows(icae.backbone, [[]], [12], icae.dtype, icae.device)
    cache, start = DynamicCache(config=icae.base_model.config), 0
    for n in (7, 1, 3, 1):
        part = x[start : start + n]
        expected = icae.base_model(inputs_embeds=part[None], past_key_values=cache, use_cache=True).logits[0, -1]
        hidden = icae.backbone.forward(part, rows.append([n]), cache=rows)
        torch.testing.assert_close(icae.base_model.lm_head(hidden)[-1], expected, **CLOSE)
        start += n


def check_backward(icae, level):
    """Compare the gradient of the training step's stack, in which every layer keeps `level`."""
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
