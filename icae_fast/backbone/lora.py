"""LoRA of a layer for the backbone: packed factors, or merged weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class PackedLoRA:
    """One layer's LoRA factors in the layout of `lora_qkv_rope`.

    Args:
        a: (2 r, d), A_q above A_v, in the compute dtype.
        b: (Hq D + Hkv D, r), B_q above B_v, in the compute dtype.
        scale: alpha / r.
        dropout_p: dropout probability, 0 outside training.
        dropout_seed: () int64, None without dropout.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    dropout_p: float
    dropout_seed: torch.Tensor | None

    @property
    def parts(self) -> tuple[torch.Tensor, torch.Tensor, float, float, torch.Tensor | None]:
        """The fields a, b, scale, dropout_p and dropout_seed."""
        return self.a, self.b, self.scale, self.dropout_p, self.dropout_seed


@dataclass(frozen=True, eq=False)
class MergedQKV:
    """One layer's packed weights with LoRA merged; `lora_qkv_rope` takes them instead of base weights and LoRA.

    Args:
        weight: ((Hq + 2 Hkv) D, d), W_q' above W_k above W_v', in the compute dtype.
    """

    weight: torch.Tensor
