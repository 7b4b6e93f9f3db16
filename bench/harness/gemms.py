"""The bare matrix products of icae_fast's encoder; the rest of the encoder's time is overhead."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from icae_fast import ICAE
from icae_fast.backbone.packing import packed_qkv
from icae_fast.backbone.rows import micro_batches

Product = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # (m, k) times (k, n) into (m, n)


class BareGemms:
    """The products of `icae.compress` with the fused adapter, by `torch.mm` into preallocated buffers.

    A layer has packed QKV, one LoRA down-projection for q and v, LoRA up for q and for v, the output projection, one
    product for gate and up, and down. The last layer computes keys and values for all rows and everything else for
    memory rows only. Weights are the model's, so every layer's are read from memory as in the encoder. The other
    factor is random, and results are not accumulated.

    Args:
        icae: the model.
        span_lengths: tokens of each span.
        token_budget: tokens of a micro-batch, as in `icae.compress`.

    Attributes:
        flops: multiplications and additions of a call.
    """

    def __init__(self, icae: ICAE, span_lengths: Sequence[int], token_budget: int) -> None:
        k = icae.config.memory_size
        costs = [n + k for n in span_lengths]
        batches = [(sum(costs[i] for i in b), k * len(b)) for b in micro_batches(costs, token_budget)]
        self._buffers: dict[tuple[int, str], torch.Tensor] = {}
        self._rows = max(tokens for tokens, _ in batches)
        self._dtype, self._device = icae.dtype, icae.device
        layers = _layer_weights(icae)
        self._products = [p for batch in batches for p in self._batch(layers, *batch)]
        self.flops = sum(2 * x.shape[0] * w.numel() for x, w, _ in self._products)

    @torch.no_grad()
    def __call__(self) -> int:
        """Run the products and return the number of operations."""
        for x, weight, out in self._products:
            torch.mm(x, weight, out=out)
        return self.flops

    def _batch(self, layers: list[dict[str, torch.Tensor]], tokens: int, slots: int) -> list[Product]:
        products = [p for w in layers[:-1] for p in self._whole_layer(w, tokens)]
        return products + self._last_layer(layers[-1], tokens, slots)

    def _whole_layer(self, w: dict[str, torch.Tensor], tokens: int) -> list[Product]:
        names = ("qkv", "a", "b_q", "b_v", "o", "gate_up", "down")
        return [self._product(tokens, w[name]) for name in names]

    def _last_layer(self, w: dict[str, torch.Tensor], tokens: int, slots: int) -> list[Product]:
        query_rows, rank = len(w["b_q"]), w["b_q"].shape[1]
        of_all = (w["qkv"][query_rows:], w["a"][rank:], w["b_v"])
        of_memory = (w["qkv"][:query_rows], w["a"][:rank], w["b_q"], w["o"], w["gate_up"], w["down"])
        products = [self._product(tokens, weight) for weight in of_all]
        return products + [self._product(slots, weight) for weight in of_memory]

    def _product(self, rows: int, weight: torch.Tensor) -> Product:
        x, out = self._buffer(weight.shape[1], "in"), self._buffer(weight.shape[0], "out")
        return x[:rows], weight.t(), out[:rows]

    def _buffer(self, width: int, side: str) -> torch.Tensor:
        if (width, side) not in self._buffers:
            self._buffers[width, side] = torch.randn(self._rows, width).to(self._device, self._dtype)
        return self._buffers[width, side]


def _layer_weights(icae: ICAE) -> list[dict[str, torch.Tensor]]:
    """Return each layer's matrices, (out, in)."""
    q_features = icae.backbone.num_q_heads * icae.backbone.head_dim
    weights = []
    with torch.no_grad():
        for layer, lora in zip(icae.backbone.view, icae.adapter.pack(icae.dtype, dropout=False), strict=True):
            assert layer.swiglu is not None, "the bare products are those of a gated SiLU MLP"
            gate, up, _ = layer.swiglu
            b_q, b_v = lora.b.split((q_features, len(lora.b) - q_features))
            weights.append({
                "qkv": packed_qkv(layer)[0], "a": lora.a, "b_q": b_q, "b_v": b_v,
                "o": layer.o.weight, "down": layer.down.weight,
                "gate_up": _one_block(gate.weight, up.weight),
            })  # fmt: skip
    return weights


def _one_block(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return both stacked by rows: a view if they are adjacent in memory, else a copy."""
    storage = first.untyped_storage()
    end = storage.data_ptr() + storage.nbytes()
    if second.data_ptr() == first.data_ptr() + first.nbytes and second.data_ptr() + second.nbytes <= end:
        return first.as_strided((len(first) + len(second), *first.shape[1:]), first.stride())
    return torch.cat((first, second))
