"""Restoration loss with slots stored in fewer bits: `python -m bench.quality.quantized_slots TEXT`.

The figure is the autoencoding loss: the frozen decoder reads the slots as a `MemoryStore` returns them and is scored on
the text with teacher forcing, in nats per token. Everything is computed in fp32, so rows differ only by the storage.
The adapter is the bundled one, at the sizes that it was trained for, on a text that it was not trained on.

Writes docs/results/quantized-slots-MACHINE.json.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch

from bench.quality.command import publish, read_text
from icae_fast import ICAE
from icae_fast.benchmark.measure import rounded
from icae_fast.io.bundled import load_smollm2
from icae_fast.step import loss
from icae_fast.store.quantize import SlotDtype, pack_slots, unpack_slots
from icae_fast.training.methods.objectives import autoencoding_sample, pad_samples

STORED: tuple[SlotDtype | None, ...] = (None, "bfloat16", "int8")
ADAPTER = "smollm2-135m"
CASES = ((2, 32), (4, 32), (2, 16))  # (compression rate at 32 slots, slots per span)


def stored(slots: torch.Tensor, dtype: SlotDtype | None) -> torch.Tensor:
    """Return slots (n, d) as a store with this `dtype` would return them, in their own dtype."""
    return unpack_slots(pack_slots(slots, dtype), slots.dtype).to(slots.dtype)


def rows_stored(rows: Sequence[torch.Tensor], dtype: SlotDtype | None) -> list[torch.Tensor]:
    """Return `stored` of the slots of every row."""
    return [stored(row, dtype) for row in rows]


@contextlib.contextmanager
def slots_changed(change: Callable[[list[torch.Tensor]], list[torch.Tensor]]) -> Iterator[None]:
    """Let the loss read `change(slots of all rows)` while open."""
    encode = loss.encode
    with mock.patch.object(loss, "encode", lambda *arguments: change(encode(*arguments))):
        yield


@torch.no_grad()
def restoration(icae: ICAE, windows: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Return the loss of restoring windows, and the error of the stored slots, for each dtype in `STORED`.

    Args:
        icae: the adapter.
        windows: ids, all of one length.

    Returns:
        `loss` (nats per token) and `slot_error` (RMS over the RMS of slots) by dtype name, "own" for unchanged slots;
        `loss_from_others`, the loss with the slots of the next window, which is what the decoder guesses without the
        memory.
    """
    batch = pad_samples(icae, [autoencoding_sample(icae, w.tolist()) for w in windows])
    slots = torch.cat(icae.encode(list(windows)))
    result: dict[str, Any] = {"loss": {}, "slot_error": {}}
    for dtype in STORED:
        with slots_changed(partial(rows_stored, dtype=dtype)):
            result["loss"][dtype or "own"] = icae(**batch)["loss"].item()
        off = stored(slots, dtype) - slots
        result["slot_error"][dtype or "own"] = (off.square().mean() / slots.square().mean()).sqrt().item()
    with slots_changed(lambda rows: [*rows[1:], rows[0]]):
        result["loss_from_others"] = icae(**batch)["loss"].item()
    return result


def measure(text: str) -> list[dict[str, Any]]:
    """Return a row for each of `CASES`, as JSON values."""
    base, tokenizer = load_smollm2(torch.float32)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    rows = []
    for rate, k in CASES:
        icae = ICAE.from_pretrained(ADAPTER, base_model=base, tokenizer=tokenizer, compression_rate=rate)
        icae = icae.with_memory_size(k).eval()
        length = icae.config.max_span_tokens
        windows = [w for w in ids.split(length) if len(w) == length]
        row = {"adapter": ADAPTER, "tokens": length, "slots": k, "windows": len(windows)}
        rows.append(rounded(row | restoration(icae, windows), 5))
    return rows


def main(arguments: Sequence[str]) -> None:
    """Measure on the text file named on the command line, and write the results."""
    publish("quantized-slots", measure(read_text("bench.quality.quantized_slots", __doc__, arguments)))


if __name__ == "__main__":
    main(sys.argv[1:])
