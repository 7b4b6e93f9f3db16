"""icae_fast's decoding in bf16 against llama.cpp's with the 4-bit file: `python -m bench.rivals.llama_cpp`.

llama.cpp (PyPI: llama-cpp-python) has to be compiled, which takes about ten minutes on two cores, so it is no part of
`make bench-decode`. Both decode SmolLM2-135M in one process, on as many threads, in interleaved rounds, behind as many
tokens: icae_fast behind memory slots and a prompt, llama.cpp behind text, since it cannot read slots. What is compared
is the time of the tokens after the first. The result becomes the row `llama_cpp` of docs/results/decode-MACHINE.json,
in place of an earlier one; `make bench-decode` writes that file anew, so run it first.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch

from bench.harness import decoders
from bench.harness.compare import OURS
from bench.harness.decoders import LLAMA_CPP, Parted
from bench.harness.models import documents_for, models_for
from bench.harness.shapes import DECODE_WORKLOADS, Case
from icae_fast.benchmark.machine import REPOSITORY, describe_machine, machine_slug
from icae_fast.benchmark.measure import FirstToken, interleave, rounded
from icae_fast.io.bundled import smollm2_gguf
from icae_fast.io.files import write_atomically

# Two to three minutes: where the memory of a shared machine gives 30 GB/s for some minutes and 55 for others, 7 rounds
# met one kind alone, and gave 0.90, 1.51, 1.43 and 0.94 one after the other.
ROW, ROUNDS = "llama_cpp", 60
MISSING = (
    "llama-cpp-python is not installed. It comes as source alone and needs a C++ compiler and CMake; "
    "`pip install llama-cpp-python` builds it in about ten minutes."
)


def llama_decoder(path: Path, context: list[int], new_tokens: int) -> Callable[[], tuple[list[int], float]]:
    """A call in which llama.cpp reads a context anew and decodes greedily.

    Args:
        path: of the GGUF file.
        context: ids that are read first.
        new_tokens: how many to give; none of them ends the answer.

    Returns:
        A call that gives the new ids and the moment of the first, as `Parted` takes it.
    """
    import llama_cpp

    threads = torch.get_num_threads()
    model = llama_cpp.Llama(
        str(path), n_ctx=len(context) + new_tokens, n_batch=len(context), n_threads=threads, n_threads_batch=threads,
        verbose=False,
    )  # fmt: skip

    def best() -> int:
        # The wrapper's own sampling costs more than the choice: it builds a chain of samplers for each token.
        logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        return int(numpy.ctypeslib.as_array(logits, shape=(model.n_vocab(),)).argmax())

    def decode():
        model.reset()
        model.eval(context)
        ids = [best()]
        first = time.perf_counter()
        while len(ids) < new_tokens:
            model.eval(ids[-1:])
            ids.append(best())
        return ids, first

    return decode


def our_decoder(case: Case) -> tuple[Callable[[], tuple[list[int], float]], int]:
    """The same of icae_fast behind the case's memory, which has been read; and the tokens behind which it decodes."""
    icae = models_for(case).icae
    memory, prompts = icae.compress(documents_for(case))[0], decoders.prompts_for(case)
    prefix, suffix = icae.prompt_ids(prompts[0])

    def decode():
        clock = FirstToken()
        ids = icae.generate(memory, prompts, return_ids=True, streamer=clock, **decoders.answer_limits(case))
        return ids[0], clock.at

    return decode, len(prefix) + memory.n_slots + len(suffix)


def measure(case: Case, path: Path, rounds: int) -> dict[str, Any]:
    """The row, as JSON values.

    Args:
        case: what icae_fast decodes.
        path: llama.cpp's file of the same model.
        rounds: how many, after one that is not timed.
    """
    ours, n_context = our_decoder(case)
    generator = torch.Generator().manual_seed(0)
    context = torch.randint(case.shape.vocabulary, (n_context,), generator=generator).tolist()
    calls = {LLAMA_CPP: Parted(llama_decoder(path, context, case.new_tokens)), OURS: Parted(ours)}
    for name, answers in interleave(calls, 1 + rounds).items():
        for answer in answers:
            assert len(answer) == case.new_tokens, f"{name} gave {len(answer)} tokens instead of {case.new_tokens}"
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
    """Put a row into a suite's results, in place of one of that name."""
    result = json.loads(path.read_text())
    result["rows"] = [r for r in result["rows"] if r["name"] != row["name"]] + [row]
    write_atomically({path: (json.dumps(result, indent=1) + "\n").encode()})


def main() -> None:
    """Measure, and merge the row into this machine's results."""
    if importlib.util.find_spec("llama_cpp") is None:
        sys.exit(MISSING)
    path = REPOSITORY / "docs" / "results" / f"decode-{machine_slug(describe_machine())}.json"
    if not path.is_file():
        sys.exit(f"docs/results has no {path.name} to put the row into; run `make bench-decode` first")
    (case,) = DECODE_WORKLOADS["real"]
    row = measure(case, smollm2_gguf(), ROUNDS)
    merge(path, row)
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
