"""`icae-fast ask`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from icae_fast.cli.loading import load_memory_for, read_prompts
from icae_fast.cli.options import (
    Adapter,
    AsJson,
    Dtype,
    MemoryName,
    Model,
    NewTokens,
    Seed,
    Stop,
    Store,
    Temperature,
    TopP,
    as_text,
)
from icae_fast.io.bundled import BUNDLED_NAME


def ask(
    memory: MemoryName,
    prompts: Annotated[list[str], typer.Argument(help="Questions or instructions, - for one on stdin.", callback=as_text)],  # noqa: E501
    max_new_tokens: NewTokens = 128, temperature: Temperature = None, top_p: TopP = None, seed: Seed = None,
    stop: Stop = None, store: Store = None, adapter: Adapter = None, model: Model = BUNDLED_NAME,
    dtype: Dtype = "bfloat16", as_json: AsJson = False,
) -> None:  # fmt: skip
    """Answer questions about a memory.

    Several questions are answered in one batch. A single answer is printed while it is written.
    """
    prompts = read_prompts("" if store else memory, prompts)
    options: dict[str, Any] = {"stop_strings": stop or (), "max_new_tokens": max_new_tokens or 128}
    options |= _sampling(temperature, top_p, seed)
    icae, loaded = load_memory_for(memory, store, adapter, model, dtype, kv=True)
    if len(prompts) == 1 and not as_json:
        for piece in icae.stream(loaded, prompts, **options):
            print(piece.text, end="", flush=True)
        print()
        return
    answers = icae.answer(loaded, prompts, **options)
    if as_json:
        rows = [
            {"prompt": p, "answer": a.text, "finish_reason": a.finish_reason}
            for p, a in zip(prompts, answers, strict=True)
        ]
        print(json.dumps({"memory": memory, "answers": rows}))
        return
    for prompt, answer in zip(prompts, answers, strict=True):
        print(f"> {prompt}\n{answer.text}\n")


def _sampling(temperature: float | None, top_p: float | None, seed: int | None) -> dict[str, Any]:
    """Return the options of sampling, none for greedy decoding; a temperature of 0 is greedy whatever else is given."""
    if temperature == 0:
        return {}
    given = {"temperature": temperature, "top_p": top_p, "seed": seed}
    options = {name: value for name, value in given.items() if value is not None}
    return options | {"do_sample": True} if options else {}
