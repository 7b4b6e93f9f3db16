"""`make demo`: a real language model reads a compressed document.

Compresses `harrow_point.txt`, restores the beginning, asks two questions, and times four ways to read it.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch
from rich.console import Console
from transformers import TextStreamer
from transformers.utils import logging as transformers_logging

from bench.latency import latency_table, render
from icae_fast import ICAE, ICAEConfig, backend_of
from icae_fast.embedded import load_smollm2

HERE = Path(__file__).parent
QUESTIONS = ("Who was the first keeper of the lighthouse?", "What happened on the third of November 1878?")
RESTORED_TOKENS = 64

console = Console(highlight=False)


def main() -> None:
    """Run the demo."""
    transformers_logging.disable_progress_bar()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    warnings.filterwarnings("ignore", category=FutureWarning)

    model, tokenizer = load_smollm2(torch.bfloat16)
    torch.manual_seed(0)
    icae = ICAE.from_base(model, ICAEConfig(), tokenizer).eval()
    text = (HERE / "harrow_point.txt").read_text()

    console.rule("SmolLM2-135M-Instruct, bf16")
    console.print(f"ops run on: {', '.join(f'{op} {backend_of(op)}' for op in ('lora_qkv_rope', 'varlen_attention'))}")
    console.print(
        "[yellow]The adapter is untrained: none ships yet. Every step below is the real pipeline, but a memory made by "
        "an untrained encoder says nothing, so the text and the answers are noise."
    )

    console.rule("compress")
    memory = icae.compress(text)[0]
    raw = memory.n_source_tokens * 2 * icae.backbone.n_layers * icae.backbone.num_kv_heads * icae.backbone.head_dim * 2
    console.print(f"{len(text)} characters, {memory.n_source_tokens} tokens")
    console.print(f"spans        {list(memory.span_lengths)}")
    console.print(f"slots        {memory.n_slots} vectors of {icae.backbone.hidden_size}")
    console.print(f"ratio        {memory.compression_ratio:.2f} tokens a slot")
    console.print(f"memory       {memory.nbytes:,} bytes (the text's KV cache would be {raw:,})")

    console.rule(f"restore (the first {RESTORED_TOKENS} tokens)")
    icae.restore(memory, max_new_tokens=RESTORED_TOKENS, streamer=TextStreamer(tokenizer))

    console.rule("ask")
    for question, answer in zip(QUESTIONS, icae.generate(memory, QUESTIONS, max_new_tokens=48), strict=True):
        console.print(f"[bold]{question}[/bold]")
        console.print(" ".join(answer.split()) or "(nothing)", markup=False)

    console.rule("latency")
    document = tokenizer(text)["input_ids"]
    prompt = tokenizer(QUESTIONS[0], add_special_tokens=False)["input_ids"]
    with console.status("timing, in interleaved rounds"):
        result = latency_table(icae, document, prompt, new_tokens=32, rounds=3)
    console.print(render(result))


if __name__ == "__main__":
    main()
