"""`icae-fast restore`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from icae_fast.cli.loading import load_memory_for
from icae_fast.cli.options import Adapter, AsJson, Dtype, MemoryName, Model, NewTokens, Store
from icae_fast.cli.output import describe
from icae_fast.io.bundled import BUNDLED_NAME


def restore(
    memory: MemoryName,
    by_span: Annotated[bool, typer.Option("--by-span", help="Restore each span from its slots separately; for texts of more spans than the adapter was trained with.")] = False,  # noqa: E501
    max_new_tokens: NewTokens = None, store: Store = None, adapter: Adapter = None, model: Model = BUNDLED_NAME,
    dtype: Dtype = "bfloat16", as_json: AsJson = False,
) -> None:  # fmt: skip
    """Write out the text of a memory."""
    icae, loaded = load_memory_for(memory, store, adapter, model, dtype)
    if by_span:  # here the limit applies to each span
        text = icae.restore_by_span(loaded, max_new_tokens=max_new_tokens)
        if not as_json:
            print(text)
    elif as_json:
        text = icae.restore(loaded, max_new_tokens=max_new_tokens)
    else:
        from transformers import TextStreamer

        streamer = TextStreamer(icae.tokenizer, skip_special_tokens=True)
        text = icae.restore(loaded, max_new_tokens=max_new_tokens, streamer=streamer)
    if as_json:
        print(json.dumps({"memory": memory, "text": text} | describe(loaded)))
