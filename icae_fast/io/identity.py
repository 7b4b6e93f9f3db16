"""Identity of a base model: check that it is the one an adapter or a memory was made with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from icae_fast.backbone.families.table import view_of
from icae_fast.errors import BaseModelMismatchError

_SAMPLES_PER_TENSOR = 64
# Share of sampled weights that must agree. Converting fp16 to bf16 rounds twice and changes up to 1 value in 16; a
# fine-tuned model differs in most.
_MIN_EQUAL = 0.85
_SHAPE_FIELDS = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "vocab_size",
)  # fmt: skip


def base_identity(model: nn.Module) -> dict[str, Any]:
    """Return the shape of a base model and a fingerprint of its weights, as JSON values; see `check_base`.

    The fingerprint consists of 64 evenly spaced weights of each of: the embedding, the matrices of the first, middle
    and last layer, and the final norm. They are rounded to bf16, so that the fingerprint does not depend on the dtype
    in which the model is loaded.
    """
    view = view_of(model)
    n = len(view.layers)
    modules: list[Any] = [view.embedding, view.final_norm]
    for layer in map(view.layer, sorted({0, n // 2, n - 1})):
        modules += (layer.qkv[0], layer.o, layer.down)
    bits = [_sample(m.weight).view(torch.int16).tolist() for m in modules]
    identity = {name: getattr(model.config, name, None) for name in _SHAPE_FIELDS}
    identity["vocab_size"] = modules[0].weight.shape[0]
    return identity | {"fingerprint": "".join(f"{b & 0xFFFF:04x}" for row in bits for b in row)}


def _sample(weight: torch.Tensor) -> torch.Tensor:
    flat = weight.detach().reshape(-1)
    step = max(1, flat.numel() // _SAMPLES_PER_TENSOR)
    return flat[::step][:_SAMPLES_PER_TENSOR].cpu().to(torch.bfloat16)


def check_base(model: nn.Module, identity: dict[str, Any], what: str) -> None:
    """Raise unless `model` is the base model with this identity.

    Args:
        model: the base model.
        identity: from `base_identity` of the base model that `what` was made for.
        what: the adapter or memory, as the subject of the message.

    Raises:
        BaseModelMismatchError: the shape or the weights differ.
    """
    compare_identities(base_identity(model), identity, what)


def compare_identities(mine: dict[str, Any], identity: dict[str, Any], what: str) -> None:
    """Raise unless two identities are of the same base model.

    Args:
        mine: identity of the base model in use.
        identity: identity of the base model that `what` was made for.
        what: the adapter or memory, as the subject of the message.

    Raises:
        BaseModelMismatchError: the shape or the weights differ.
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
    """Return the first 16 hex digits of SHA-256 over names, shapes and fp32 values, which identify an adapter."""
    digest = hashlib.sha256()
    for name, tensor in named:
        values = tensor.detach().to(device="cpu", dtype=torch.float32).contiguous()
        digest.update(f"{name}{tuple(values.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]
