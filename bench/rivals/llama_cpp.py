"""Decoding in bf16 against llama.cpp with a 4-bit file: `python -m bench.rivals.llama_cpp`.

llama.cpp (PyPI: llama-cpp-python) must be compiled, which takes about ten minutes on two cores, so it is not part of
`make bench-decode`. Both decode SmolLM2-135M in one process, with the same number of threads, in interleaved rounds,
after the same number of tokens: icae_fast after memory slots and a prompt, llama.cpp after text, since it cannot read
slots. The time of the tokens after the first is compared. The result replaces the row `llama_cpp` of
docs/results/decode-MACHINE.json. `make bench-decode` rewrites that file, so run it first.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

from bench.harness import decoders
from bench.harness.compare import OURS, RESULTS, results_path, write_json
from bench.harness.decoders import LLAMA_CPP, SplitTimer
from bench.harness.models import documents_for, models_for
from bench.harness.shapes import DECODE_WORKLOADS, Case
from icae_fast.benchmark.machine import describe_machine
from icae_fast.benchmark.measure import FirstToken, interleave, rounded
from icae_fast.io.bundled import smollm2_gguf

# 60 rounds take two to three minutes. On a shared machine whose memory reached 30 GB/s in some minutes and 55 in
# others, 7 rounds saw only one kind of minute: four runs measured 0.90, 1.51, 1.43 and 0.94.
ROW, ROUNDS = "llama_cpp", 60
MISSING = (
    "llama-cpp-python is not installed; `pip install llama-cpp-python` builds it in about ten minutes "
    "(it needs a C++ compiler and CMake)"
)


def llama_decoder(path: Path, context: list[int], new_tokens: int) -> Callable[[], tuple[list[int], float]]:
    """Return a call in which llama.cpp runs the prefill and decodes greedily.

    Args:
        path: the GGUF file.
        context: ids of the prefill.
        new_tokens: tokens to decode; no token ends the answer.

    Returns:
        A call for `SplitTimer` that returns the new ids and the moment of the first.
    """
    import llama_cpp

    threads = torch.get_num_threads()
    model = llama_cpp.Llama(
        str(path), n_ctx=len(context) + new_tokens, n_batch=len(context), n_threads=threads, n_threads_batch=threads,
        verbose=False,
    )  # fmt: skip

    def best() -> int:
        # The wrapper's sampling costs more than the argmax, since it builds a chain of samplers for every token.
        logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        return int(numpy.ctypeslib.as_array(logits, shape=(model.n_vocab(),)).argmax())

    def decode() -> tuple[list[int], float]:
        model.reset()
        model.eval(context)
        ids = [best()]
        first = time.perf_counter()
        while len(ids) < new_tokens:
            model.eval(ids[-1:])
            ids.append(best())
        return ids, first

    return decode


def our_decoder(case: Case) -> tuple[Callable[[], tuple[list[int], float | None]], int]:
    """Return the same call for icae_fast with the case's memory, and the number of tokens before the answer."""
    icae = models_for(case).icae
    memory, prompts = icae.compress(documents_for(case))[0], decoders.prompts_for(case)
    prefix, suffix = icae.prompt_ids(prompts[0])

    def decode() -> tuple[list[int], float | None]:
        clock = FirstToken()
        ids = icae.generate(memory, prompts, return_ids=True, streamer=clock, **decoders.answer_limits(case))
        return ids[0], clock.at

    return decode, len(prefix) + memory.n_slots + len(suffix)


def measure(case: Case, path: Path, rounds: int) -> dict[str, Any]:
    """Return the row as JSON values.

    Args:
        case: the workload.
        path: llama.cpp's file of the same model.
        rounds: timed rounds, after one that is not timed.
    """
    ours, n_context = our_decoder(case)
    generator = torch.Generator().manual_seed(0)
    context = torch.randint(case.shape.vocabulary, (n_context,), generator=generator).tolist()
    calls = {LLAMA_CPP: SplitTimer(llama_decoder(path, context, case.new_tokens)), OURS: SplitTimer(ours)}
    for name, answers in interleave(calls, 1 + rounds).items():
        for answer in answers:
            assert len(answer) == case.new_tokens, f"{name} returned {len(answer)} tokens instead of {case.new_tokens}"
    machine = describe_machine()
    return rounded(
        {
            "name": ROW,
            "case": case.name,
            "new_tokens": case.new_tokens,
            "context_tokens": n_context,
            "file": path.name,
            "llama_cpp_python": importlib.metadata.version("llama-cpp-python"),
            "commit": machine["commit"],
            "dirty": machine["dirty"],
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "rounds": rounds,
            **decoders.step_facts(case.new_tokens - 1, {name: call.after[1:] for name, call in calls.items()}),
        }
    )


def merge(path: Path, row: dict[str, Any]) -> None:
    """Put a row into a suite's results, replacing the one of that name."""
    result = json.loads(path.read_text())
    result["rows"] = [r for r in result["rows"] if r["name"] != row["name"]] + [row]
    write_json(path, result)


def main(arguments: Sequence[str] = ()) -> None:
    """Measure, and merge the row into this machine's results."""
    argparse.ArgumentParser(prog="python -m bench.rivals.llama_cpp", description=__doc__).parse_args(arguments)
    if importlib.util.find_spec("llama_cpp") is None:
        sys.exit(MISSING)
    path = results_path("decode", describe_machine(), RESULTS)
    if not path.is_file():
        sys.exit(f"docs/results has no {path.name} to add the row to; run `make bench-decode` first")
    (case,) = DECODE_WORKLOADS["real"]
    row = measure(case, smollm2_gguf(), ROUNDS)
    merge(path, row)
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
