"""The slot code: slots made from token embeddings by a few matrices, trained only through the frozen decoder.

Restoration teaches an encoder two things at once, the content of a slot and how to find it in the text, and at a ratio
above 1 it learns neither for hundreds of steps. The slot code learns the first separately, without running an encoder:

    slot_i = scale(b + sum_j M_j e(t_{s_i + j})),   s_i = floor(i * L / k),   j from -w to r + w - 1

for slot i of k over a span of L tokens t, e scaled to unit RMS (zeros outside the span), r the compression rate and w a
number of neighbours. M, b, the slot gain and the AE token learn from the losses of restoring the span from such slots;
the rest of the adapter is not used. On SmolLM2, 64 tokens into 32 slots, 8,000 samples reach a teacher-forced accuracy
of 0.83 on a book outside the training data. A warm start then has the slots' directions as its targets
(`icae_fast.training.methods.warm_start`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from icae_fast.core.core import ICAECore
from icae_fast.core.encoder import scale_slots, slot_norm
from icae_fast.core.spans import span_lengths
from icae_fast.errors import CheckpointError
from icae_fast.io.files import load_tensors

CODE_FILE = "slot_code.safetensors"
NEIGHBOURS = 1


class SlotCode(nn.Module):
    """A module that makes slots without an encoder. Untrained, a slot is the mean of its share of the span.

    Args:
        hidden_size: d.
        rate: r, tokens per slot of full spans.
        neighbours: w, tokens that are read on each side of a share.
        dtype: dtype of the matrices.
    """

    def __init__(
        self, hidden_size: int, rate: int, neighbours: int = NEIGHBOURS, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.neighbours = neighbours
        maps = torch.zeros(rate + 2 * neighbours, hidden_size, hidden_size, dtype=dtype)
        maps[neighbours : neighbours + rate] = torch.eye(hidden_size, dtype=dtype) / rate
        self.maps = nn.Parameter(maps)
        self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=dtype))

    @classmethod
    def of(cls, icae: ICAECore) -> SlotCode:
        """Return an untrained slot code for an adapter, on its device."""
        rate = -(-icae.config.max_span_tokens // icae.config.memory_size)
        code = cls(icae.backbone.hidden_size, rate, dtype=icae.memory_token_embed.weight.dtype)
        return code.to(icae.device)

    def forward(self, icae: ICAECore, ids: torch.Tensor, lengths: Sequence[int], memory_size: int) -> torch.Tensor:
        """Return slots before their scaling.

        Args:
            icae: the model, for its embeddings.
            ids: (sum of lengths,) int64 ids of all spans, concatenated, on any device.
            lengths: L of each span, at least 1.
            memory_size: k.

        Returns:
            (spans, k, d) in the dtype of the matrices.
        """
        length = torch.tensor(lengths)
        first = length.cumsum(0) - length
        offsets = torch.arange(-self.neighbours, len(self.maps) - self.neighbours)
        places = (
            share_starts(length, memory_size)[:, :-1, None] + offsets
        )  # (spans, k, tokens), from the start of the span
        inside = (places >= 0) & (places < length[:, None, None])
        tokens = ids[(places + first[:, None, None]).clamp(0, len(ids) - 1).to(ids.device)]
        embeddings = icae.embed(tokens).to(self.maps.dtype) * inside[..., None].to(icae.device)
        embeddings = embeddings * (math.sqrt(embeddings.shape[-1]) / icae.embedding_norm().to(embeddings.dtype))
        return torch.einsum("skjd,jed->ske", embeddings, self.maps) + self.bias

    def slots(self, icae: ICAECore, contexts: Sequence[torch.Tensor], memory_size: int) -> list[torch.Tensor]:
        """Return the slots of each context, (n_spans_i * k, d), in the format of `ICAE.encode`."""
        lengths = [span_lengths(len(ids), icae.config) for ids in contexts]
        coded = self(icae, torch.cat(list(contexts)), [n for own in lengths for n in own], memory_size).flatten(0, 1)
        norm = slot_norm(icae)
        if norm is None:  # without a gain, slots are scaled to the size of embeddings
            coded = coded * (icae.embedding_norm() / math.sqrt(coded.shape[-1]))
        return list(scale_slots(coded, norm, icae.slot_gain).split([len(own) * memory_size for own in lengths]))

    def save(self, folder: Path) -> None:
        """Write `slot_code.safetensors` into a folder."""
        save_file({name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}, folder / CODE_FILE)

    def load(self, folder: Path) -> None:
        """Load the matrices written by `save`.

        Raises:
            CheckpointError: the file is missing, or has other shapes.
        """
        try:
            self.load_state_dict(load_tensors(folder / CODE_FILE)[0])
        except (CheckpointError, RuntimeError) as error:
            raise CheckpointError(
                f"{folder} has no slot code of this run's shapes ({str(error).splitlines()[0]}); continue with the "
                "settings it was begun with, or choose another output folder"
            ) from error


def share_starts(length: torch.Tensor, memory_size: int) -> torch.Tensor:
    """Return the start of each slot's share of its span, `floor(i * L / k)`.

    Args:
        length: (spans,) int64, L of each span.
        memory_size: k.

    Returns:
        (spans, k + 1) int64; the last entry is L.
    """
    return torch.arange(memory_size + 1) * length[:, None] // memory_size
