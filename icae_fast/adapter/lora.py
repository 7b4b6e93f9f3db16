"""The trained adapter of an ICAE: LoRA on q and v in every layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import nn

from icae_fast.backbone.lora import PackedLoRA
from icae_fast.config import ICAEConfig

# The order in which a layer's tensors are listed and packed.
PROJECTIONS = ("q", "v")
FACTORS = ("A", "B")


class LoRAAdapter(nn.Module):
    """LoRA factors of the query and value projections of every layer.

    Factors are in fp32 even for a bf16 base, as in PEFT, and are cast for each forward: an optimiser step of 1e-4 would
    round away in bf16.

    Args:
        config: rank, alpha and dropout.
        n_layers: number of the base model's layers.
        in_features: d, the base model's hidden size.
        q_features, v_features: output features of the projections, Hq D and Hkv D.
        dtype: dtype of the factors, fp32 by default.
    """

    def __init__(
        self, config: ICAEConfig, n_layers: int, in_features: int, q_features: int, v_features: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        super().__init__()
        self.scale, self.dropout_p = config.lora_scale, config.lora_dropout
        rank, out = config.lora_rank, {"q": q_features, "v": v_features}
        shapes = {(p, f): (rank, in_features) if f == "A" else (out[p], rank) for p in PROJECTIONS for f in FACTORS}
        self.layers = nn.ModuleList(
            nn.ParameterDict({f"{p}_{f}": torch.zeros(shape, dtype=dtype) for (p, f), shape in shapes.items()})
            for _ in range(n_layers)
        )
        self.reset_parameters()

    @property
    def factors(self) -> Sequence[nn.ParameterDict]:
        """The factors of each layer by name: "q_A", "q_B", "v_A" and "v_B"."""
        return cast("Sequence[nn.ParameterDict]", self.layers)  # the type `ModuleList` does not name its elements

    def reset_parameters(self) -> None:
        """Draw A by Kaiming's uniform rule (a = sqrt(5)) and zero B, so that B A = 0 (LoRA, section 4.1)."""
        for layer in self.factors:
            for p in PROJECTIONS:
                nn.init.kaiming_uniform_(layer[f"{p}_A"], a=math.sqrt(5))
                nn.init.zeros_(layer[f"{p}_B"])

    def named_factors(self) -> Iterator[tuple[int, str, str, nn.Parameter]]:
        """Yield (layer, "q" or "v", "A" or "B", parameter) of every factor."""
        for i, layer in enumerate(self.factors):
            for p in PROJECTIONS:
                for f in FACTORS:
                    yield i, p, f, layer[f"{p}_{f}"]

    def pack(self, dtype: torch.dtype, *, dropout: bool = True) -> list[PackedLoRA]:
        """Pack and cast every layer's factors for one forward, with fresh dropout seeds in training.

        Nothing is cached between calls: a write through `.data` would make a cache stale, and packing costs 7.4 M casts
        on SmolLM2 at rank 128, under 1 % of encoding one span.

        Args:
            dtype: compute dtype.
            dropout: False to leave dropout out in training mode too.
        """
        drop = dropout and self.training and self.dropout_p > 0
        layers = self.factors
        device = layers[0]["q_A"].device
        seeds = torch.randint(2**62, (len(layers),)).to(device) if drop else [None] * len(layers)
        # One concatenation for all layers: four launches a layer would take a GPU longer than their work.
        of_a, of_b = ([layer[f"{p}_{f}"] for layer in layers for p in PROJECTIONS] for f in FACTORS)
        rows_a, rows_b = (sum(map(len, of[: len(PROJECTIONS)])) for of in (of_a, of_b))
        packed_a, packed_b = torch.cat(of_a).to(dtype).split(rows_a), torch.cat(of_b).to(dtype).split(rows_b)
        p = self.dropout_p if drop else 0.0
        return [PackedLoRA(a, b, self.scale, p, seed) for a, b, seed in zip(packed_a, packed_b, seeds, strict=True)]
