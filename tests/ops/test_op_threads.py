"""What does and what does not depend on the number of threads, and more threads than CPUs."""

import dataclasses
import os
import shutil
import subprocess
import sys

import pytest
import torch

import icae_fast.testing
from helpers.build import ROOT, make_inputs
from icae_fast.ops import REGISTRY, StepCache, StepWeights, bind_decode_step

# Ops that order their sums alike with any number of threads. The others call ATen's products, which do not, or add up
# gradients of keys and values from as many slices as keep all threads busy.
ALIKE = ("varlen_attention", "shared_prefix_attention", "decode_step", "rms_norm", "rms_norm_backward")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux sets the CPUs of a process")


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def results_with(threads, spec, sample, dtype):
    torch.set_num_threads(threads)
    inputs = icae_fast.testing.make_inputs(sample, dtype)
    return icae_fast.testing.as_tuple(getattr(torch.ops.icae_fast, spec.name)(**inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("spec", REGISTRY.values(), ids=lambda s: s.name)
@pytest.mark.usefixtures("two_threads")
def test_results_repeat_bit_for_bit(spec, dtype):
    """With one number of threads every op repeats; those of `ALIKE` also do with another number."""
    for sample in spec.samples:
        first = results_with(2, spec, sample, dtype)
        for threads in (2, *((1, 3) if spec.name in ALIKE else ())):
            again = results_with(threads, spec, sample, dtype)
            torch.testing.assert_close(again, first, rtol=0, atol=0, equal_nan=True)


@LINUX
def test_more_threads_than_cpus_step_alike():
    """Thirty-two threads on one CPU compute the same logits as one thread."""
    inputs = make_inputs("decode_step", "nine-rows")
    flat = inputs["prefix_rows"]
    cache = StepCache(
        inputs["tail_keys"], inputs["tail_values"], inputs["prefix_keys"], inputs["prefix_values"],
        list(zip(flat[::2], flat[1::2], strict=True)),
    )  # fmt: skip
    weights = StepWeights(**{f.name: inputs[f.name] for f in dataclasses.fields(StepWeights)})
    angles = torch.rand(400, inputs["tail_keys"].shape[3] // 2, generator=torch.Generator().manual_seed(6))
    step = bind_decode_step(weights, angles.cos(), angles.sin(), cache, inputs["tail_starts"].tolist())
    threads, cpus = torch.get_num_threads(), os.sched_getaffinity(0)
    results = []
    try:
        for n in (1, 2, 32):
            torch.set_num_threads(n)
            os.sched_setaffinity(0, {min(cpus)} if n == 32 else cpus)
            results.append(step.step(inputs["tokens"], inputs["tail_lengths"].tolist()))
    finally:
        os.sched_setaffinity(0, cpus)
        torch.set_num_threads(threads)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("flags", [[], ["-fsanitize=thread", "-g"]], ids=["plain", "tsan"])
def test_phases_wait_for_one_another(flags, tmp_path):
    """Threads of a token step see what the others wrote, wake from their sleep, and all end if a task throws."""
    program, source = tmp_path / "phases", ROOT / "tests/ops/phases.cpp"
    built = subprocess.run(
        ["c++", "-std=c++20", "-O1", "-pthread", *flags, "-I", ROOT / "csrc", source, "-o", program],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    # ThreadSanitizer needs its addresses where it expects them.
    fixed = ["setarch", "-R"] if flags and shutil.which("setarch") else []
    run = subprocess.run([*fixed, program], capture_output=True, text=True, timeout=300, check=False)
    if fixed and "setarch" in run.stderr:
        run = subprocess.run([program], capture_output=True, text=True, timeout=300, check=False)
    assert (run.returncode, run.stdout) == (0, "0 wrong sums, 0 silent threads\n"), run.stderr
