"""What storing slots in fewer bits does to restoration: `python -m bench.quality.quantized_slots
examples/harrow_point.txt`.

The figure is the autoencoding loss: the frozen decoder reads the slots as a `MemoryStore` gives them back and is scored
on the text, teacher-forced, in nats a token. Everything is computed in fp32, so that rows differ by the storage alone.
The adapter is the package's own, at the sizes that it was trained for, on a text that it was not trained on.

Writes docs/results/quantized-slots-MACHINE.json.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from icae_fast import ICAE
from icae_fast.benchmark.machine import REPOSITORY, describe_machine, machine_slug
from icae_fast.benchmark.measure import rounded
from icae_fast.io.bundled import load_smollm2
from icae_fast.store.quantize import SlotDtype, pack_slots, unpack_slots
from icae_fast.training.methods.objectives import autoencoding_sample, pad_samples

STORED: tuple[SlotDtype | None, ...] = (None, "bfloat16", "int8")
ADAPTER = "smollm2-135m"
CASES = ((2, 32), (4, 32), (2, 16))  # compression rate of 32 slots, and slots a span


def stored(slots: torch.Tensor, dtype: SlotDtype | None) -> torch.Tensor:
    """Slots (n, d) as they come back from a store with this `dtype`, in their own dtype."""
    return unpack_slots(pack_slots(slots, dtype), slots.dtype).to(slots.dtype)


@contextlib.contextmanager
def slots_changed(icae: ICAE, change: Callable[[list[torch.Tensor]], list[torch.Tensor]]) -> Iterator[None]:
    """While it is open the decoder gets what `change` makes of the slots of all rows."""
    encode = icae.encode
    icae.encode = lambda *arguments: change(encode(*arguments))
    try:
        yield
    finally:
        del icae.encode


@torch.no_grad()
def restoration(icae: ICAE, windows: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Loss of restoring each window (of one length), and how far storage moves slots, for each dtype in `STORED`.

    Returns:
        `loss` (nats a token) and `slot_error` (RMS over the RMS of slots), by name, "own" for unchanged; and
        `loss_from_others`, with the slots of the next window: what the decoder guesses without the memory.
    """
    batch = pad_samples(icae, [autoencoding_sample(icae, w.tolist()) for w in windows])
    slots = torch.cat(icae.encode(list(windows)))
    result: dict[str, Any] = {"loss": {}, "slot_error": {}}
    for dtype in STORED:
        with slots_changed(icae, lambda rows, dtype=dtype: [stored(row, dtype) for row in rows]):
            result["loss"][dtype or "own"] = icae(**batch)["loss"].item()
        off = stored(slots, dtype) - slots
        result["slot_error"][dtype or "own"] = (off.square().mean() / slots.square().mean()).sqrt().item()
    with slots_changed(icae, lambda rows: [*rows[1:], rows[0]]):
        result["loss_from_others"] = icae(**batch)["loss"].item()
    return result


def measure(text: str) -> list[dict[str, Any]]:
    """A row for each of `CASES`, as JSON values."""
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


def main() -> None:
    """Measure on the file named on the command line."""
    rows, machine = measure(Path(sys.argv[1]).read_text(encoding="utf-8")), describe_machine()
    path = REPOSITORY / "docs" / "results" / f"quantized-slots-{machine_slug(machine)}.json"
    path.write_text(json.dumps({"suite": "quantized-slots", "machine": machine, "rows": rows}, indent=1) + "\n")
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
