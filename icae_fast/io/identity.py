"""Tells whether a base model is the one that an adapter or a memory was made with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from icae_fast.backbone.families.table import view_of
from icae_fast.errors import BaseModelMismatchError

_SAMPLES_PER_TENSOR = 64
# Converting fp16 to bf16 rounds twice and moves up to 1 value in 16; a fine-tuned model differs in most.
_MIN_EQUAL = 0.85
_SHAPE_FIELDS = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "vocab_size",
)  # fmt: skip


def base_identity(model: nn.Module) -> dict[str, Any]:
    """Shape and a fingerprint of a base model's weights.

    The fingerprint is 64 evenly spaced weights, rounded to bf16, of the embedding, of the first, middle and
    last layer's matrices and of the final norm, so that it is the same whichever dtype the model is
    loaded in.

    Returns:
        JSON values; see `check_base`.
    """
    view = view_of(model)
    n = len(view.layers)
    chosen = [view.embedding.weight, view.final_norm.weight]
    for layer in map(view.layer, sorted({0, n // 2, n - 1})):
        chosen += [m.weight for m in (layer.qkv[0], layer.o, layer.down)]
    bits = [_sample(w).view(torch.int16).tolist() for w in chosen]
    identity = {name: getattr(model.config, name, None) for name in _SHAPE_FIELDS}
    identity["vocab_size"] = chosen[0].shape[0]
    return identity | {"fingerprint": "".join(f"{b & 0xFFFF:04x}" for row in bits for b in row)}


def _sample(weight: torch.Tensor) -> torch.Tensor:
    flat = weight.detach().reshape(-1)
    step = max(1, flat.numel() // _SAMPLES_PER_TENSOR)
    return flat[::step][:_SAMPLES_PER_TENSOR].cpu().to(torch.bfloat16)


def check_base(model: nn.Module, identity: dict[str, Any], what: str) -> None:
    """Raise unless `model` is the base that `identity` was taken from.

    Raises:
        BaseModelMismatchError: another shape, or other weights.
    """
    compare_identities(base_identity(model), identity, what)


def compare_identities(mine: dict[str, Any], identity: dict[str, Any], what: str) -> None:
    """Raise unless both are of one base model, `identity` being that which `what` was made for.

    Raises:
        BaseModelMismatchError: another shape, or other weights.
    """
    differing = [f"{n} {identity[n]} (here {mine[n]})" for n in _SHAPE_FIELDS if n in identity and identity[n] != mine[n]]  # noqa: E501  # fmt: skip
    if differing:
        raise BaseModelMismatchError(
            f"{what} was made for a base model with {', '.join(differing)}; pass the base model it was trained on"
        )
    theirs, ours = str(identity.get("fingerprint", mine["fingerprint"])), mine["fingerprint"]
    n = len(ours) // 4
    equal = sum(theirs[4 * i : 4 * i + 4] == ours[4 * i : 4 * i + 4] for i in range(n)) / n
    if len(theirs) != len(ours) or equal < _MIN_EQUAL:
        raise BaseModelMismatchError(
            f"{what} was made for a base model of this shape but with other weights ({equal:.0%} of the sampled ones "
            "agree); pass the base model it was trained on, not another fine-tuning of it"
        )


def tensors_hash(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over names, shapes and fp32 values, as 16 hex digits: the identity of an adapter."""
    digest = hashlib.sha256()
    for name, tensor in named:
        values = tensor.detach().to(device="cpu", dtype=torch.float32).contiguous()
        digest.update(f"{name}{tuple(values.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]
