"""This checkout against another checkout of the project: `python -m bench.rivals.checkout DIRECTORY`.

Shows whether a change of structure costs time. Each checkout is imported in a process of its own, with its own built
extension. Both processes hold the same model and run the same call in turns, and one waits while the other computes.
Only the public API is called, so that old checkouts can run it. The result is written to
docs/results/checkout-MACHINE.json: every time is a ratio of the two, round by round.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

CALLS = ("compress", "first_token", "decode", "train")
# 4 contexts of 512 tokens, 64 new tokens, and one training sample of 512 tokens.
ROWS, LENGTH, NEW_TOKENS = 4, 512, 64


def timed_calls() -> dict[str, Callable[[], object]]:
    """Return the calls, by name, of the `icae_fast` that this process imports."""
    from icae_fast import ICAE

    icae = ICAE.from_pretrained("smollm2-135m")
    generator = torch.Generator().manual_seed(0)
    contexts = list(torch.randint(1000, 40_000, (ROWS, LENGTH), generator=generator))
    memory = icae.compress(contexts[0])[0]
    prompts = [[500, 600, 700]]
    slots = torch.full((memory.n_slots,), icae.vocabulary.first_memory)
    prompt = torch.cat([slots, torch.tensor([icae.vocabulary.ae]), contexts[0]])
    labels = torch.cat([torch.full((memory.n_slots + 1,), -100), contexts[0]])

    def answer(tokens: int) -> object:
        return icae.generate(memory, prompts, max_new_tokens=tokens, min_new_tokens=tokens, return_ids=True)

    def train() -> object:
        icae.train()
        for parameter in icae.parameters():
            parameter.grad = None
        icae.token_losses(contexts[:1], [prompt], [labels]).losses.mean().backward()
        icae.eval()
        return None

    return {
        "compress": lambda: icae.compress(contexts),
        "first_token": lambda: answer(1),
        "decode": lambda: answer(NEW_TOKENS),
        "train": train,
    }


def serve(threads: int) -> None:
    """Run the calls named on stdin, one a line, and write the seconds of each to stdout."""
    torch.set_num_threads(threads)
    calls = timed_calls()
    print(sys.modules["icae_fast"].__file__, flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        calls[line.strip()]()
        print(time.perf_counter() - start, flush=True)


class Checkout:
    """A process that serves the calls of one checkout.

    Args:
        root: the checkout; its `icae_fast/` holds a built extension.
        threads: CPU threads.

    Raises:
        SystemExit: the process imported another `icae_fast`, or ended.
    """

    def __init__(self, root: Path, threads: int) -> None:
        self.root = root.resolve()
        # A script, not a module: `-m bench...` would import the checkout's own benchmarks.
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--serve", str(threads)],
            cwd=self.root, env={**os.environ, "PYTHONPATH": str(self.root)}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        imported = Path(self._read())
        if self.root not in imported.parents:
            sys.exit(f"{self.root} was to be measured, but {imported} was imported; is there an icae_fast/ in it?")

    def _read(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline()
        return line.strip() or sys.exit(f"the process of {self.root} ended; what it said stands above")

    def seconds(self, call: str) -> float:
        """Return the time of one call."""
        assert self._process.stdin
        self._process.stdin.write(f"{call}\n")
        self._process.stdin.flush()
        return float(self._read())

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def commit(self) -> str:
        """Return the checked-out commit."""
        command = ["git", "-C", str(self.root), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def measure(other: Path, rounds: int) -> dict[str, Any]:
    """Return the comparison as JSON values.

    Args:
        other: the other checkout.
        rounds: timed rounds of every call, after one that is not timed. The two change places every round.

    Returns:
        The machine, both commits, and for each call `ratio` (other's time over this one's: above 1, this checkout is
        faster) beside `noise`, the ratio of two successive times of the other checkout.
    """
    from icae_fast.benchmark.machine import REPOSITORY, describe_machine
    from icae_fast.benchmark.measure import pair_ratios, rounded, speedup

    sides = {"this": Checkout(REPOSITORY, torch.get_num_threads()), "other": Checkout(other, torch.get_num_threads())}
    seconds: dict[str, dict[str, list[float]]] = {c: {side: [] for side in sides} for c in CALLS}
    for i in range(1 + rounds):
        for call in CALLS:
            for side in sorted(sides, reverse=bool(i % 2)):
                seconds[call][side].append(sides[side].seconds(call))
    for side in sides.values():
        side.close()
    rows = {}
    for call, times in seconds.items():
        this, before = times["this"][1:], times["other"][1:]
        rows[call] = {"ratio": speedup(this, before), "noise": pair_ratios(before[:-1], before[1:])}
    commits = {side: checkout.commit() for side, checkout in sides.items()}
    return rounded({**describe_machine(), "commits": commits, "rounds": rounds, "calls": rows})


def main(arguments: Sequence[str] = ()) -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(prog="python -m bench.rivals.checkout", description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path, help="the other checkout, with its extension built")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        return serve(options.serve)
    if options.directory is None:
        parser.error("name the other checkout")
    from icae_fast.benchmark.machine import REPOSITORY, machine_slug

    result = measure(options.directory, options.rounds)
    path = REPOSITORY / "docs" / "results" / f"checkout-{machine_slug(result)}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["calls"], indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
