"""Time this checkout against another one of the same project: `python -m bench.rivals.checkout DIRECTORY`.

It measures whether a change that should cost no time costs some. DIRECTORY holds the other commit with its own built
extension. Both processes hold the same model and run the same call in turns, and one waits while the other computes.
Only the public API is called, so that old checkouts can run it. The results must agree before anything is timed.
Writes docs/results/checkout-MACHINE.json: every figure is a ratio of the two times, round by round.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

# `serve` runs in the other checkout, which may lack today's modules: this file imports the project's inside functions.
CALLS = ("compress", "first_token", "decode", "train")
# 4 contexts of 512 tokens, 64 new tokens, and one training sample of 512 tokens.
ROWS, LENGTH, NEW_TOKENS = 4, 512, 64


def timed_calls() -> dict[str, Callable[[], torch.Tensor]]:
    """Return the calls, by name, of the `icae_fast` that this process imports; each returns its result."""
    from icae_fast import ICAE

    icae = ICAE.from_pretrained("smollm2-135m")
    generator = torch.Generator().manual_seed(0)
    contexts = list(torch.randint(1000, 40_000, (ROWS, LENGTH), generator=generator))
    memory = icae.compress(contexts[0])[0]
    prompts = [[500, 600, 700]]
    slots = torch.full((memory.n_slots,), icae.vocabulary.first_memory)
    prompt = torch.cat([slots, torch.tensor([icae.vocabulary.ae]), contexts[0]])
    labels = torch.cat([torch.full((memory.n_slots + 1,), -100), contexts[0]])

    def answer(tokens: int) -> torch.Tensor:
        ids = icae.generate(memory, prompts, max_new_tokens=tokens, min_new_tokens=tokens, return_ids=True)
        return torch.tensor(ids)

    def train() -> torch.Tensor:
        icae.train()
        for parameter in icae.parameters():
            parameter.grad = None
        losses = icae.token_losses(contexts[:1], [prompt], [labels]).losses
        losses.mean().backward()
        icae.eval()
        return losses.detach()

    return {
        "compress": lambda: torch.cat([memory.slots for memory in icae.compress(contexts)]),
        "first_token": lambda: answer(1),
        "decode": lambda: answer(NEW_TOKENS),
        "train": train,
    }


def serve(threads: int) -> None:
    """Run the calls named on stdin and write the seconds of each to stdout.

    A line is the name of a call, and after a space the file to save its result in, if it is to be saved.
    """
    torch.set_num_threads(threads)
    calls = timed_calls()
    print(sys.modules["icae_fast"].__file__, flush=True)
    for line in sys.stdin:
        name, _, file = line.rstrip("\n").partition(" ")
        start = time.perf_counter()
        result = calls[name]()
        seconds = time.perf_counter() - start
        if file:
            torch.save(result, file)
        print(seconds, flush=True)


class Checkout:
    """A process that serves the calls of one checkout; a context manager that ends it.

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
            self.close()
            sys.exit(f"{self.root} was to be measured, but {imported} was imported; is there an icae_fast/ in it?")

    def __enter__(self) -> Checkout:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline().strip() or self._ended()

    def _ended(self) -> NoReturn:
        self.close()
        sys.exit(f"the process of {self.root} ended; its error message is above")

    def seconds(self, call: str) -> float:
        """Return the time of one call."""
        return self._run(call)

    def result(self, call: str) -> torch.Tensor:
        """Return the result of one call."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "result.pt"
            self._run(f"{call} {file}")
            result: torch.Tensor = torch.load(file)
            return result

    def _run(self, line: str) -> float:
        assert self._process.stdin
        try:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._ended()
        return float(self._read())

    def close(self) -> None:
        """End the process; a second call does nothing."""
        assert self._process.stdin
        assert self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def commit(self) -> str:
        """Return the checked-out commit."""
        command = ["git", "-C", str(self.root), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def check(call: str, this: torch.Tensor, other: torch.Tensor) -> None:
    """Assert that both checkouts compute the same result of a call.

    Slots and losses must be equal up to the rounding of bf16. Answers must have the same number of tokens: after a near
    tie two roundings choose different ones.
    """
    from icae_fast.benchmark.checks import assert_same

    if this.is_floating_point():
        assert_same(this, other, torch.bfloat16, call)
    else:
        assert this.shape == other.shape, f"{call}: shapes {tuple(this.shape)} and {tuple(other.shape)}"


def measure(this: Path, other: Path, rounds: int) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Time both checkouts.

    Args:
        this, other: the checkouts.
        rounds: timed rounds of every call, after one that is checked and not timed. The two change places every round.

    Returns:
        Both commits, and for each call a row of JSON values: `ratio` (other's time over this one's: above 1, this
        checkout is faster) beside `noise`, the ratio of two successive times of the other checkout.
    """
    from icae_fast.benchmark.measure import pair_ratios, rounded, speedup

    threads = torch.get_num_threads()
    with Checkout(this, threads) as ours, Checkout(other, threads) as theirs:
        for call in CALLS:
            check(call, ours.result(call), theirs.result(call))
        seconds: dict[str, dict[Checkout, list[float]]] = {call: {ours: [], theirs: []} for call in CALLS}
        for i in range(rounds):
            for call in CALLS:
                for side in (ours, theirs) if i % 2 else (theirs, ours):
                    seconds[call][side].append(side.seconds(call))
        commits = {"this": ours.commit(), "other": theirs.commit()}
    rows = []
    for call, times in seconds.items():
        before = times[theirs]
        noise = pair_ratios(before[:-1], before[1:])
        rows.append(rounded({"name": call, "ratio": speedup(times[ours], before), "noise": noise}))
    return commits, rows


def main(arguments: Sequence[str] = ()) -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(prog="python -m bench.rivals.checkout", description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path, help="the other checkout, with its extension built")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, at least 2 (%(default)s)")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        return serve(options.serve)
    if options.directory is None or not options.directory.is_dir():
        parser.error("name the folder of the other checkout")
    if options.rounds < 2:
        parser.error("--rounds must be at least 2: the noise is measured between rounds")
    from bench.harness.compare import write_results
    from icae_fast.benchmark.machine import REPOSITORY, describe_machine

    commits, rows = measure(REPOSITORY, options.directory, options.rounds)
    write_results("checkout", describe_machine(), rows, commits=commits, rounds=options.rounds)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main(sys.argv[1:])
