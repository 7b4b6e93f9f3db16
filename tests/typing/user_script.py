"""A user's script, for type checkers only: `make pyright` must find no error in it."""

from pathlib import Path

import torch

from icae_fast import ICAE, ActivationBudget, Answer, ICAEConfig, Memory, MemoryStore, SlotKV, backend_of, errors
from icae_fast.sampling import GenerationOptions


def make() -> ICAE:
    """Load an adapter, and make a new one on the same base model."""
    icae = ICAE.from_pretrained("smollm2-135m", dtype=torch.bfloat16)
    config = ICAEConfig(memory_size=128, compression_rate=4, lora_rank=128, memory_positions="spread")
    new: ICAE = ICAE.from_base(icae.base_model, config, icae.tokenizer)
    new.adapter_mode = "merged"
    new.save_pretrained(Path("adapter"))
    return new


def answer(icae: ICAE, documents: list[str], questions: list[str]) -> None:
    """Compress, extend, restore and ask."""
    memories: list[Memory] = icae.compress(documents)
    memory = icae.extend(memories[0], "one more chapter")
    slots: torch.Tensor = memory.slots
    print(slots.shape, memory.n_source_tokens, memory.span_lengths)

    text: str = icae.restore(memory)
    ids: list[int] = icae.restore(memory, return_ids=True)
    print(text.upper(), sum(ids))

    answers: list[str] = icae.generate(memory, questions)
    sampled: list[str] = icae.generate(memory, prompts=questions, do_sample=True, temperature=0.7, top_p=0.9, seed=0)
    rows: list[list[int]] = icae.generate(memory, questions, return_ids=True)
    print(answers + sampled, len(rows))

    full: list[Answer] = icae.answer(memory, questions, stop_strings=["\n\n"])
    print(full[0].text, full[0].finish_reason)
    for row, piece, finish_reason in icae.stream(memory, questions, max_new_tokens=64):
        print(row + 1, piece.strip(), finish_reason)
    print(GenerationOptions(top_k=5).top_k, backend_of("varlen_attention", "cpu").upper())


def keep(icae: ICAE, documents: list[str]) -> None:
    """Store memories and read them back."""
    with MemoryStore("memories", icae, dtype="int8") as store:
        memories: list[Memory] = store.compress(documents, kv=True)
        store.put("handbook", memories[0])
        memory: Memory = store.get("handbook", kv=True)
        kv: SlotKV = icae.memory_kv(memory)
        icae.adopt_kv(memory, kv)
        for key in store.keys():  # noqa: SIM118 (a store is no mapping)
            print(key.upper())


def train(icae: ICAE, rows: list[torch.Tensor]) -> float:
    """Take the gradients of both losses."""
    icae.train()
    try:
        loss: torch.Tensor = icae(rows, rows, rows)["loss"]
        losses = icae.token_losses(rows, rows, rows, ActivationBudget(bytes=2 << 30)).losses
    except errors.InvalidInputError as error:
        raise SystemExit(str(error)) from error
    (loss + losses.mean()).backward()
    return loss.item()
