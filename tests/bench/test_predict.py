"""Predicted costs: kernels are counted exactly, counts are linear in spans, and PEFT's launches are as listed."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("peft", reason="the baseline needs peft")

from bench.harness.models import build_base, build_icae
from bench.harness.shapes import MODELS, attention_flops, qkv_flops
from bench.kernels.unfused import Step, unfused_head, unfused_layer
from icae_fast import ICAEConfig
from icae_fast.benchmark.machine import REPOSITORY

# Runs in a new process, because Triton decides on import whether it interprets.
SCRIPT = """
import dataclasses, json
from bench.kernels.predict import Setting, extrapolated, layer_counts
setting = Setting("tiny", tokens=96, slots=32, rank=32, arch=0)
counts = [layer_counts(setting, n) for n in (1, 2, 4)]
predicted = extrapolated(counts[0], counts[1], 4)
last = [layer_counts(setting, n, last=True) for n in (1, 2, 4)]
plain = lambda counts: {op: {k: dataclasses.asdict(t) for k, t in kernels.items()} for op, kernels in counts.items()}
print(json.dumps({"one": plain(counts[0]), "four": plain(counts[2]), "predicted": plain(predicted),
                  "last": plain(last[2]), "last_predicted": plain(extrapolated(last[0], last[1], 4))}))
"""


@pytest.fixture(scope="module")
def counts():
    environment = os.environ | {"TRITON_INTERPRET": "1", "ICAE_FAST_REQUIRE": "triton"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_straight_line_through_one_and_two_spans_gives_four(counts):
    assert counts["predicted"] == counts["four"]
    assert counts["last_predicted"] == counts["last"]


def test_a_norm_reads_and_writes_each_element_once(counts):
    n, d = 128, MODELS["tiny"].hidden_size
    kernel = counts["one"]["rms_norm"]["rms_norm.forward"]
    assert kernel["read"] == 2 * (2 * n * d + d)
    assert kernel["written"] == 2 * 2 * n * d
    assert kernel["requested"] == 2 * (4 * n * d + n * d) + kernel["written"]
    assert (kernel["launches"], kernel["flops"]) == (1, 0)


def flops(kernels):
    return sum(kernel["flops"] for kernel in kernels.values())


def test_products_are_those_of_the_formulas(counts):
    s, n = MODELS["tiny"], 128
    one = counts["one"]
    assert flops(one["swiglu"]) == 2 * n * s.hidden_size * 2 * s.mlp
    assert flops(one["linear, down"]) == 2 * n * s.hidden_size * s.mlp
    least = qkv_flops(s, n, rank=32)
    assert least <= flops(one["lora_qkv_rope"]) <= 2 * least  # some columns of tiles are padding
    least = attention_flops(s, [(n, n)])
    assert least <= flops(one["varlen_attention"]) <= 4 * least  # tiles on the diagonal are half masked


def test_all_that_a_launch_needs_is_read_once(counts):
    s, n, rank = MODELS["tiny"], 128, 32
    q, kv = s.q_heads * s.head_dim, s.kv_heads * s.head_dim
    main = counts["one"]["lora_qkv_rope"]["lora_qkv_rope.forward"]
    x, weight, b, angles = n * s.hidden_size, (q + 2 * kv) * s.hidden_size, (q + kv) * rank, n * s.head_dim
    assert main["read"] == 2 * (x + weight + n * 2 * rank + b) + 4 * angles
    assert main["written"] == 2 * n * (q + 2 * kv)
    assert main["requested"] > main["read"] + main["written"]


class Launches(torch.utils._python_dispatch.TorchDispatchMode):
    """Record the calls of aten functions that compute something, and count their products' operations."""

    def __init__(self):
        super().__init__()
        self.calls, self.flops = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        from torch.utils.flop_counter import flop_registry

        out = func(*args, **(kwargs or {}))
        aliases = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if not aliases and "empty" not in str(func) and "_unsafe_view" not in str(func):
            self.calls.append(str(func))
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def test_the_unfused_layer_is_what_the_baseline_launches():
    """Compare with the launches that one more layer adds to the baseline's encoder in bf16."""
    import dataclasses
    from unittest import mock

    from icae_fast.benchmark.baseline import BaselineICAE

    seen = []
    for layers in (2, 3):
        shape = dataclasses.replace(MODELS["tiny"], layers=layers, kv_heads=4)
        with mock.patch.dict(MODELS, tiny=shape):
            base, _ = build_base("tiny", torch.bfloat16)
        icae = build_icae(base, ICAEConfig(memory_size=8, compression_rate=4, lora_rank=8))
        baseline = BaselineICAE.from_icae(icae)
        with Launches() as launches, torch.no_grad():
            baseline.compress(torch.arange(32))
        seen.append(launches)
    steps = unfused_layer(shape, [(40, 40)], rank=8)
    extra = list(seen[1].calls)
    for call in seen[0].calls:
        extra.remove(call)
    assert sum(step.launches for step in steps) == len(extra), extra
    # torch does not count the attention that a CPU runs.
    products = sum(step.flops for step in steps) - attention_flops(shape, [(40, 40)])
    assert products == seen[1].flops - seen[0].flops


def test_a_step_of_the_unfused_layer_reads_its_weights_and_its_cache():
    s = MODELS["llama2-7b"]
    steps = unfused_layer(s, [(1, 512)], rank=0)
    assert sum(step.bytes for step in steps) > 2 * s.layer_weights() + 2 * 2 * 2 * 512 * s.hidden_size
    assert not any(step.fp32 for step in steps)
    assert all(isinstance(step, Step) for step in unfused_head(s, 1))
