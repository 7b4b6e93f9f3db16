"""The activation budget: which activations a training step keeps for its backward, and which it recomputes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from icae_fast.checks import is_int
from icae_fast.errors import ConfigError
from icae_fast.step.tape import Level, kept_bytes

if TYPE_CHECKING:
    from icae_fast.backbone.stack import Backbone

MIB = 1 << 20


@dataclass(frozen=True)
class ActivationBudget:
    """Memory that a training step may use for activations that its backward would otherwise recompute.

    Gradients do not depend on the budget. Spans are independent given their slots. With a budget of 0 they are encoded
    without keeping activations, the gradient at the slots is computed, and each span runs again; each layer of the
    frozen decoder keeps its input and is recomputed from it. The budget is spent in the order of time saved per byte:
    attention outputs (decoder, then spans), then whole layers.

    Args:
        bytes: the budget, in addition to the input of each decoder layer and the layers of one micro-batch of spans,
            which are always kept; None keeps everything, by plain autograd.
        span_tokens: context and memory tokens of a micro-batch of spans; a longer span is a micro-batch by itself.
            None for the device's default, 1024 on the CPU and 8192 on CUDA.
        offload: keep layer inputs and attention outputs in host memory. No effect on a CPU.

    Raises:
        ConfigError: bytes is negative, or span_tokens under 1.
    """

    bytes: int | None = 512 * MIB
    span_tokens: int | None = None
    offload: bool = False

    def __post_init__(self) -> None:
        for name, value, least in (("bytes", self.bytes, 0), ("span_tokens", self.span_tokens, 1)):
            if value is None:
                continue
            if not is_int(value) or value < least:
                raise ConfigError(
                    f"{name} of the activation budget is {value!r}; give a whole number of at least {least}"
                )


EVERYTHING = ActivationBudget(bytes=None, span_tokens=4096)


@dataclass(frozen=True)
class ActivationPlan:
    """What a step keeps of each layer.

    Args:
        decoder: level of each layer of the decoder.
        spans: level of each layer, for each micro-batch of spans.
    """

    decoder: tuple[Level, ...]
    spans: tuple[tuple[Level, ...], ...]


def plan(
    budget: ActivationBudget, backbone: Backbone, itemsize: int, decoder_tokens: int, span_tokens: Sequence[int]
) -> ActivationPlan:
    """Choose what to keep under a budget.

    Args:
        budget: the budget; `bytes=None` keeps everything.
        backbone: has the layer sizes.
        itemsize: bytes of an element.
        decoder_tokens: packed tokens of the decoder.
        span_tokens: packed tokens of each micro-batch of spans.
    """
    n, left = backbone.n_layers, budget.bytes
    if left is None:
        everything = (Level.ALL,) * n
        return ActivationPlan(everything, (everything,) * len(span_tokens))

    def more(tokens, low, high):
        """Return the bytes that a layer needs more at the level `high` than at `low`."""
        return kept_bytes(backbone, high, tokens, itemsize) - kept_bytes(backbone, low, tokens, itemsize)

    def affordable(cost, most):
        nonlocal left
        count = min(most, left // cost) if cost else most
        left -= count * cost
        return count

    def levels(low, high, count):
        # The last layers get the higher level: their backward comes first and frees it before others are recomputed.
        return (low,) * (n - count) + (high,) * count

    with_attention = affordable(more(decoder_tokens, Level.HIDDEN, Level.ATTENTION), n)
    light = [bool(affordable(n * more(t, Level.NOTHING, Level.ATTENTION), 1)) for t in span_tokens]
    decoder = levels(Level.HIDDEN, Level.ATTENTION, with_attention)
    if with_attention == n:
        decoder = levels(Level.ATTENTION, Level.ALL, affordable(more(decoder_tokens, Level.ATTENTION, Level.ALL), n))
    spans = []
    for tokens, kept in zip(span_tokens, light, strict=True):
        whole = affordable(more(tokens, Level.ATTENTION, Level.ALL), n) if kept else 0
        spans.append(levels(Level.ATTENTION, Level.ALL, whole) if kept else (Level.NOTHING,) * n)
    return ActivationPlan(decoder, tuple(spans))
