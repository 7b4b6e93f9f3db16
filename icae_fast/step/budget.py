"""How much of a training step is kept for its backward, and what is computed again instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from icae_fast.errors import ConfigError
from icae_fast.step.tape import Level, kept_bytes

if TYPE_CHECKING:
    from icae_fast.backbone.stack import Backbone

MIB = 1 << 20


@dataclass(frozen=True)
class ActivationBudget:
    """How much memory a training step may spend on what its backward would otherwise compute again.

    Gradients do not depend on it. Spans are independent given their slots, so with no budget at all they are encoded
    without keeping anything, the decoder's gradient at the slots is taken, and span after span runs again; each layer
    of the frozen decoder keeps the hidden state that it reads, and is computed again from that. What the budget allows
    is kept in the order of the time that a byte saves: attention's results (decoder, then spans), then whole layers.

    Args:
        bytes: the budget, beyond a hidden state for each decoder layer and the layers of one micro-batch of spans,
            which are needed in any case; None keeps everything, by plain autograd.
        span_tokens: context and memory tokens of a micro-batch of spans; a longer span goes alone. None for
            what suits the device, 1024 on the CPU and 8192 on CUDA.
        offload: hold the hidden states and attention's results of layers in the host's memory. Changes nothing on a
            CPU.

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
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} of the activation budget is {value!r}; give a whole number from {least} on")


EVERYTHING = ActivationBudget(bytes=None, span_tokens=4096)


@dataclass(frozen=True)
class ActivationPlan:
    """What a step keeps.

    Args:
        decoder: level of each of the decoder's layers.
        spans: for each micro-batch of spans, the level of each layer.
    """

    decoder: tuple[Level, ...]
    spans: tuple[tuple[Level, ...], ...]


def plan(
    budget: ActivationBudget, backbone: Backbone, itemsize: int, decoder_tokens: int, span_tokens: Sequence[int]
) -> ActivationPlan:
    """What to keep under a budget.

    Args:
        budget: None for its `bytes` keeps everything.
        backbone: gives sizes.
        itemsize: bytes of an element.
        decoder_tokens: packed tokens that the decoder reads.
        span_tokens: packed tokens of each micro-batch of spans.
    """
    n, left = backbone.n_layers, budget.bytes
    if left is None:
        everything = (Level.ALL,) * n
        return ActivationPlan(everything, (everything,) * len(span_tokens))

    def more(tokens, low, high):
        """Bytes that a layer takes more at the level `high` than at `low`."""
        return kept_bytes(backbone, high, tokens, itemsize) - kept_bytes(backbone, low, tokens, itemsize)

    def affordable(cost, most):
        nonlocal left
        count = min(most, left // cost) if cost else most
        left -= count * cost
        return count

    def levels(low, high, count):
        # The last layers: their backward comes first, so what they keep is gone when the others are computed again.
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
