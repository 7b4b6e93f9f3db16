"""Identity of a base model: check that it is the one an adapter or a memory was made with."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from icae_fast.backbone.families.table import view_of
from icae_fast.errors import BaseModelMismatchError

# Share of sampled weights that must agree. Converting fp16 to bf16 rounds twice and changes up to 1 value in 16; a
# fine-tuned model differs in most. Of all samples 0.85 must agree, and of those of one kind or layer, which are 64 or
# more, 0.75: so many changes by rounding have a probability below 1e-6.
_MIN_EQUAL, _MIN_EQUAL_OF_PART = 0.85, 0.75
_SAMPLES = 64  # of a kind of tensor at least
_SAMPLES_PER_LAYER = 6
# The fingerprint's versions. 1 has only some kinds of tensors and three layers; it is still written, so that older
# versions of this package can check it, and still read.
_V1, _V2 = "fingerprint", "fingerprint_v2"
_SHAPE_FIELDS = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "vocab_size",
)  # fmt: skip


def base_identity(model: nn.Module) -> dict[str, Any]:
    """Return the shape of a base model and fingerprints of its weights, as JSON values; see `check_base`.

    `fingerprint_v2` has, for each kind of parameter (such as `self_attn.k_proj.weight`), weights at pseudo-random
    places in all layers: the lower byte of each, rounded to bf16, in base64. `fingerprint`, its first version, consists
    of 64 evenly spaced weights of each of: the embedding, q, o and down of the first, middle and last layer, and the
    final norm. Neither depends on the dtype in which the model is loaded.
    """
    view = view_of(model)
    n = len(view.layers)
    modules: list[Any] = [view.embedding, view.final_norm]
    for layer in map(view.layer, sorted({0, n // 2, n - 1})):
        modules += (layer.qkv[0], layer.o, layer.down)
    bits = [_evenly_sampled(m.weight).view(torch.int16).tolist() for m in modules]
    identity = {name: getattr(model.config, name, None) for name in _SHAPE_FIELDS}
    identity["vocab_size"] = modules[0].weight.shape[0]
    identity[_V1] = "".join(f"{b & 0xFFFF:04x}" for row in bits for b in row)
    return identity | {_V2: {kind: _sampled(tensors) for kind, tensors in _kinds(model).items()}}


def _evenly_sampled(weight: torch.Tensor) -> torch.Tensor:
    flat = weight.detach().reshape(-1)
    step = max(1, flat.numel() // _SAMPLES)
    return flat[::step][:_SAMPLES].cpu().to(torch.bfloat16)


def _kinds(model: nn.Module) -> dict[str, list[torch.Tensor]]:
    """Return the parameters of a model by kind: one for each layer, or a single one outside of the layers."""
    view = view_of(model)
    outside = {"embedding": view.embedding, "norm": view.final_norm, "head": view.head}
    kinds: dict[str, list[torch.Tensor]] = {name: [module.get_parameter("weight")] for name, module in outside.items()}
    for layer in view.layers:
        for name, parameter in layer.named_parameters():
            kinds.setdefault(name, []).append(parameter)
    return kinds


def _sampled(tensors: list[torch.Tensor]) -> str:
    """Return samples of a kind as text, those of the first layer first."""
    count = max(_SAMPLES_PER_LAYER, -(-_SAMPLES // len(tensors)))
    places: dict[torch.Size, tuple[torch.Tensor, ...]] = {}
    found = []
    for tensor in tensors:
        if tensor.shape not in places:
            indices = torch.tensor(_places(tensor.numel(), count), device=tensor.device)
            places[tensor.shape] = torch.unravel_index(indices, tensor.shape)
        found.append(tensor.detach()[places[tensor.shape]].to(torch.bfloat16))
    bits = torch.cat(found).cpu().view(torch.int16)
    return base64.b64encode(bytes(b & 0xFF for b in bits.tolist())).decode()


def _places(size: int, count: int) -> list[int]:
    """Return indices that lie evenly in a tensor but in no row or column of it: multiples of the golden ratio."""
    return [((i + 1) * 0x9E3779B97F4A7C15 % 2**64) * size >> 64 for i in range(count)]


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
    theirs, ours = str(identity.get(_V1, mine[_V1])), mine[_V1]
    n = len(ours) // 4
    equal = sum(theirs[4 * i : 4 * i + 4] == ours[4 * i : 4 * i + 4] for i in range(n)) / n
    found = f"{equal:.0%} of the sampled ones agree" if len(theirs) != len(ours) or equal < _MIN_EQUAL else None
    if found is None and _V1 in identity and _V2 in identity and _V2 in mine:
        found = next(_differences(mine[_V2], identity[_V2], mine["num_hidden_layers"]), None)
    if found:
        raise BaseModelMismatchError(
            f"{what} was made for a base model of this shape but with other weights ({found}); pass the base model it "
            "was trained on, not another fine-tuning of it"
        )


def _differences(mine: dict[str, str], theirs: Any, n_layers: int) -> Iterator[str]:
    """Yield what differs between two fingerprints of version 2: kinds of tensors, layers, and single tensors."""
    if not isinstance(theirs, dict) or mine.keys() != theirs.keys():
        names = sorted(mine.keys() ^ theirs.keys()) if isinstance(theirs, dict) else ["its fingerprint"]
        yield f"{', '.join(names[:3])} in only one of them"
        return
    layers: dict[int, list[bool]] = {}
    for kind, text in mine.items():
        ours, others = base64.b64decode(text), _decoded(theirs[kind])
        equal = [a == b for a, b in zip(ours, others, strict=False)]
        if len(ours) != len(others) or sum(equal) < _MIN_EQUAL_OF_PART * len(equal):
            yield f"{sum(equal) / len(ours):.0%} of the sampled ones of {kind} agree"
            continue
        if "." not in kind or len(equal) % n_layers:
            continue  # not of a layer, or not in every layer
        for i in range(n_layers):
            part = equal[i * len(equal) // n_layers : (i + 1) * len(equal) // n_layers]
            if not any(part):
                yield f"none of the sampled ones of {kind} in layer {i} agree"
            layers.setdefault(i, []).extend(part)
    for i, equal in layers.items():
        if sum(equal) < _MIN_EQUAL_OF_PART * len(equal):
            yield f"{sum(equal) / len(equal):.0%} of the sampled ones of layer {i} agree"


def _decoded(text: Any) -> bytes:
    try:
        return base64.b64decode(text)
    except (TypeError, ValueError):  # a damaged file
        return b""


def tensors_hash(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return the first 16 hex digits of SHA-256 over names, shapes and fp32 values, which identify an adapter."""
    digest = hashlib.sha256()
    for name, tensor in named:
        values = tensor.detach().to(device="cpu", dtype=torch.float32).contiguous()
        digest.update(f"{name}{tuple(values.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]
