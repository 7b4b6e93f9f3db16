"""`make demo`: let a real language model read a compressed document.

Compress `harrow_point.txt` with the bundled adapter, restore it passage by passage, ask two questions about it, and
time four ways to read it.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text
from transformers.utils import logging as transformers_logging

from icae_fast import ICAE, Memory, backend_of
from icae_fast.benchmark.latency import latency_table, render
from icae_fast.training.evaluation.differences import word_runs

HERE = Path(__file__).parent
ADAPTER = "smollm2-135m"
QUESTIONS = ("When was the lighthouse built?", "Why was a light wanted?")
SHOWN_SPANS = 4

console = Console(highlight=False)


def main() -> None:
    """Run the demo."""
    transformers_logging.disable_progress_bar()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    warnings.filterwarnings("ignore", category=FutureWarning)

    icae = ICAE.from_pretrained(ADAPTER).eval()
    text = (HERE / "harrow_point.txt").read_text()
    document = icae.tokenizer(text)["input_ids"]

    console.rule(f"SmolLM2-135M-Instruct, bf16, adapter {ADAPTER}")
    console.print(f"ops run on: {', '.join(f'{op} {backend_of(op)}' for op in ('lora_qkv_rope', 'varlen_attention'))}")

    console.rule("compress")
    memory = icae.compress(text)[0]
    raw = memory.n_source_tokens * 2 * icae.backbone.n_layers * icae.backbone.num_kv_heads * icae.backbone.head_dim * 2
    console.print(f"{len(text)} characters, {memory.n_source_tokens} tokens")
    console.print(f"spans        {len(memory.span_lengths)} of up to {max(memory.span_lengths)} tokens")
    console.print(f"slots        {memory.n_slots} vectors of {icae.backbone.hidden_size}")
    console.print(f"ratio        {memory.compression_ratio:.2f} tokens per slot")
    console.print(f"memory       {memory.nbytes:,} bytes (the text's KV cache would be {raw:,})")

    restore(icae, document, memory)
    ask(icae, document)

    console.rule("latency")
    prompt = icae.tokenizer(QUESTIONS[0], add_special_tokens=False)["input_ids"]
    with console.status("timing, in interleaved rounds"):
        result = latency_table(icae, document, prompt, new_tokens=32, rounds=3)
    console.print(render(result))


def restore(icae: ICAE, document: list[int], memory: Memory) -> None:
    """Restore the document span by span, each from its own slots, and show the differences in the first spans."""
    spans = torch.tensor(document).split(memory.span_lengths)
    console.rule(
        f"restore ({len(spans)} passages of up to {max(map(len, spans))} tokens, from {memory.memory_size} slots each)"
    )
    n_right = n_words = 0
    with console.status("restoring"):
        texts = icae.restore(memory.spans())
    for i, (span, restored) in enumerate(zip(spans, texts, strict=True)):
        before, after = Text("text      ", style="dim"), Text("restored  ", style="dim")
        for equal, original, found in word_runs(icae.tokenizer.decode(span).split(), restored.split()):
            n_words += len(original)
            n_right += len(original) * equal
            before.append("".join(f"{word} " for word in original), style="not dim" if equal else "not dim strike")
            after.append("".join(f"{word} " for word in found), style="not dim" if equal else "not dim bold yellow")
        if i < SHOWN_SPANS:
            console.print(before, after, sep="\n", end="\n\n")
    console.print(
        f"The first {SHOWN_SPANS} passages are shown, with wrong words struck out and in yellow. Over all passages, "
        f"{n_right} of {n_words} words were restored in place."
    )


def ask(icae: ICAE, document: list[int]) -> None:
    """Ask questions about the beginning of the document."""
    console.rule("ask")
    memory = icae.compress(torch.tensor(document[: 2 * icae.config.max_span_tokens]))[0]
    for question, answer in zip(QUESTIONS, icae.generate(memory, QUESTIONS, max_new_tokens=40), strict=True):
        console.print(f"[bold]{question}[/bold]")
        console.print(" ".join(answer.split()) or "(nothing)", markup=False)
    console.print("[dim]The model has 135 million parameters; it also makes things up when it reads the text itself.")


if __name__ == "__main__":
    main()
