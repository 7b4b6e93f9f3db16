"""What storing slots in fewer bits does to restoration: `python -m bench.quantized_slots examples/harrow_point.txt`.

The figure is the autoencoding loss: the frozen decoder reads the slots as a `MemoryStore` gives them back and is scored
on the text, teacher-forced, in nats a token. Everything is computed in fp32, so that rows differ by the storage alone.
Two adapters are measured, since no trained one ships: a new one at the paper's sizes, whose slots the
decoder makes nothing of, and one trained here for some minutes at 16 tokens into 16 slots, which it does read.
The last quarter of the text is kept from training and measured on.

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
import torch.nn.functional as F

from bench.harness import rounded
from bench.machine import REPOSITORY, describe_machine, machine_slug
from bench.models import SEED
from icae_fast import ICAE, ICAEConfig
from icae_fast.embedded import load_smollm2
from icae_fast.quantize import SlotDtype, pack_slots, unpack_slots
from training.objectives import autoencoding_sample, collate

STORED: tuple[SlotDtype | None, ...] = (None, "bfloat16", "int8")
SHORT = ICAEConfig(
    memory_size=16, compression_rate=1, lora_alpha=128, memory_positions="spread", slot_scale="embedding_norm",
    lora_dropout=0.0,
)  # fmt: skip
WARM_UP, STEPS, BATCH = 80, 120, 8
LEARNING_RATE = 1e-3
_SHARPNESS = 10.0  # of the warm-up's contrast


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
    batch = collate(icae, [autoencoding_sample(icae, w.tolist()) for w in windows])
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


def contrast(icae: ICAE, rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """The warm-up's loss, () fp32: slot i is drawn to token i's embedding and away from its neighbours'."""
    slots = F.normalize(torch.stack(icae.encode(list(rows))).float(), dim=-1)
    tokens = F.normalize(icae.embed(torch.stack(list(rows))).float(), dim=-1)
    scores = slots @ tokens.transpose(1, 2)
    labels = torch.arange(scores.shape[1]).expand(len(scores), -1)
    return F.cross_entropy((scores * _SHARPNESS).flatten(0, 1), labels.flatten()) + 1 - (slots * tokens).sum(-1).mean()


def train_briefly(icae: ICAE, ids: torch.Tensor, warm_up: int, steps: int) -> None:
    """So many steps of `contrast` and then of the autoencoding loss, on random windows of one span."""
    generator = torch.Generator().manual_seed(SEED)
    length = icae.config.max_span_tokens
    parameters = [p for p in icae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 30))
    for step in range(warm_up + steps):
        starts = torch.randint(len(ids) - length, (BATCH,), generator=generator).tolist()
        rows = [ids[s : s + length] for s in starts]
        if step < warm_up:
            loss = contrast(icae, rows)
        else:
            loss = icae(**collate(icae, [autoencoding_sample(icae, r.tolist()) for r in rows]))["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 20 == 19:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)


def measure(ids: torch.Tensor, warm_up: int = WARM_UP, steps: int = STEPS) -> list[dict[str, Any]]:
    """Rows of both adapters, as JSON values."""
    kept = ids[len(ids) * 3 // 4 :]
    rows = []
    for config, trained in ((ICAEConfig(), 0), (SHORT, warm_up + steps)):
        torch.manual_seed(SEED)
        icae = ICAE.from_base(load_smollm2(torch.bfloat16)[0], config)
        if trained:
            train_briefly(icae, ids[: len(ids) * 3 // 4], warm_up, steps)
        icae.base_model.to(torch.float32)
        length = min(config.max_span_tokens, len(kept) // 2)
        windows = [w for w in kept.split(length) if len(w) == length]
        row = {"trained_steps": trained, "tokens": length, "slots": config.memory_size, "windows": len(windows)}
        rows.append(rounded(row | restoration(icae.eval(), windows), 5))
    return rows


def main() -> None:
    """Measure on the file named on the command line."""
    ids = torch.tensor(load_smollm2()[1](Path(sys.argv[1]).read_text(encoding="utf-8"))["input_ids"])
    rows, machine = measure(ids), describe_machine()
    path = REPOSITORY / "docs" / "results" / f"quantized-slots-{machine_slug(machine)}.json"
    path.write_text(json.dumps({"suite": "quantized-slots", "machine": machine, "rows": rows}, indent=1) + "\n")
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
