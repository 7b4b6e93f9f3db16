"""Kernels compiled without a GPU: their figures, their limits, and a comparison with recorded results."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from bench.kernels import check as kernels_check
from bench.kernels.limits import MULTIPROCESSORS, complaints, worse
from bench.kernels.shapes import MODEL_SAMPLE, Inputs, calls, sample_calls
from bench.kernels.tables import kernel_cells
from icae_fast.ops import REGISTRY

ROW = {
    "kernel": "op.forward", "arch": 90, "dtype": "bf16", "call": "op, encode", "config": "BLOCK=64", "warps": 4,
    "registers": 128, "spills": 0, "shared": 1 << 16, "occupancy": 0.1875, "dots": 1, "tensor_cores": ["wgmma"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "expected"),
    [
        (80, 32, 0, 4, 1.0),
        (80, 40, 0, 8, 0.75),
        (80, 255, 0, 8, 0.125),
        (80, 64, 80 << 10, 4, 0.125),
        (90, 64, 80 << 10, 4, 0.125),
        (90, 168, 227 << 10, 12, 0.1875),
        (90, 32, 0, 1, 0.5),  # 32 blocks of one warp
        (90, 255, 0, 16, 0.0),
        (90, 32, 228 << 10, 4, 0.0),
    ],
)
def test_occupancy(arch, registers, shared, warps, expected):
    assert MULTIPROCESSORS[arch].occupancy(registers, shared, warps) == expected


def test_tensor_memory_limits_occupancy():
    assert MULTIPROCESSORS[100].occupancy(32, 0, 4, tensor_memory=256) == 2 * 4 / 64


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"spills": 8}, "spills 8 bytes"),
        ({"registers": 256}, "takes 256 registers"),
        ({"shared": 228 << 10}, "bytes of shared memory; the limit is 232448"),
        ({"tensor_cores": []}, "no tensor core instruction"),
        ({"occupancy": 0.0}, "does not fit"),
        ({"error": "PTXASError"}, "does not compile: PTXASError"),
    ],
)
def test_a_passed_limit_is_a_sentence_that_names_kernel_and_configuration(change, words):
    assert complaints(ROW) == []
    (sentence,) = complaints(ROW | change)
    assert words in sentence
    assert "op.forward on sm_90 in bf16 (BLOCK=64" in sentence


def test_worse_is_less_occupancy_more_spills_or_a_lost_instruction():
    import triton

    recorded = {"triton": triton.__version__, "rows": [ROW]}
    assert worse([ROW, ROW | {"registers": 130}], recorded) == []
    for change, words in (
        ({"occupancy": 0.125}, "occupancy of 12% instead of 19%"),
        ({"spills": 4}, "spills 4 bytes instead of 0"),
        ({"tensor_cores": ["mma"]}, "no longer uses wgmma"),
        ({"config": "BLOCK=128"}, "not in the recorded results"),
    ):
        (sentence,) = worse([ROW | change], recorded)
        assert words in sentence
    assert worse([ROW | {"spills": 4}], recorded | {"triton": "0"}) == []


def test_a_table_line_is_the_worst_of_a_kernel_and_architecture():
    other = ROW | {"registers": 64, "shared": 1 << 17, "occupancy": 0.125, "dtype": "fp16"}
    assert list(kernel_cells([ROW, other])) == [["op.forward", "sm_90", "128", "0", "128.0", "12%", "wgmma"]]


def test_every_op_with_a_launcher_has_a_call_and_every_call_fits_its_op():
    listed = calls()
    assert {s.name for s in REGISTRY.values() if s.gpu is not None} <= {c.op for c in listed}
    for call in listed:
        spec = REGISTRY[call.op]
        arguments = call.make(Inputs(torch.bfloat16, "meta"))
        assert sorted(arguments) == sorted(spec.argument_names), call.name
        spec.fake(**arguments)


def test_an_op_in_no_workload_is_compiled_at_the_smollm2_sample_of_its_spec():
    spec = REGISTRY["rms_norm"]
    (call,) = sample_calls(spec)
    assert (call.op, call.name) == ("rms_norm", f"sample {MODEL_SAMPLE}")
    arguments = call.make(Inputs(torch.bfloat16, "meta"))
    assert sorted(arguments) == sorted(spec.argument_names)
    assert (arguments["x"].shape, arguments["x"].dtype) == ((64, 576), torch.bfloat16)
    assert all(t.is_meta for t in arguments.values() if isinstance(t, torch.Tensor))
    (job, *_), wrong = kernels_check.collect([call], [90], ["bf16"])
    assert job.kernel == "rms_norm.forward"
    assert "rms_norm_backward has kernels, but no sample named 'smollm2'" in "\n".join(wrong)


def run(*arguments):
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "ICAE_FAST_REQUIRE")}
    command = [sys.executable, "-m", "bench.kernels.check", *arguments]
    return subprocess.run(command, env=environment, cwd=kernels_check.REPOSITORY, capture_output=True, text=True)


def test_no_kernel_has_become_worse():
    """Compare one configuration of each kernel and architecture with docs/results/kernels.json."""
    done = run("--quick", "--compare", str(kernels_check.RESULTS))
    assert done.returncode == 0, done.stderr
    assert "rms_norm.forward" in done.stdout


def test_a_worse_kernel_fails_the_check(tmp_path):
    recorded = json.loads(kernels_check.RESULTS.read_text())
    for row in recorded["rows"]:
        row["occupancy"] = 1.0
    (tmp_path / "better.json").write_text(json.dumps(recorded))
    done = run("--quick", "--only", "rms_norm.forward", "--compare", str(tmp_path / "better.json"))
    assert done.returncode == 1
    assert "rms_norm.forward on sm_80 in bf16 (BLOCK=4096 warps=8 stages=1; rms_norm, llama2-7b encode" in done.stderr
