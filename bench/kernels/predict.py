"""Predict the cost of compressing and answering on GPUs: `TRITON_INTERPRET=1 python -m bench.kernels.predict`.

Bytes and operations of every kernel are counted in Triton's interpreter from its loads, stores and products, at the
model's real widths, for one span and for two. Encoding is linear in spans, so more spans are extrapolated along a
line. Divided by published limits of GPUs, the counts become times. They are PREDICTIONS: nothing here ran on a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.harness.compare import RESULTS, write_json
from bench.harness.shapes import MODELS, encode_flops
from bench.kernels.count import Traffic, counted
from bench.kernels.shapes import Inputs, launch, memory_rows
from bench.kernels.unfused import Step, unfused_head, unfused_layer
from icae_fast.backbone.rows import token_budget_on
from icae_fast.benchmark.shapes import ModelShape
from icae_fast.ops import REGISTRY
from icae_fast.ops._triton import INTERPRETED

NOTE = "Predictions: counted in an interpreter and divided by published limits. Nothing here was measured on a GPU."


@dataclass(frozen=True)
class Limits:
    """Published limits of a GPU: dense bf16 and plain fp32 operations per second, and bytes per second."""

    bf16: float
    fp32: float
    bandwidth: float


# NVIDIA's data sheets: "A100 Tensor Core GPU" (80 GB SXM), "H100 Tensor Core GPU" (SXM, 1,979 TFLOP/s with sparsity,
# which is twice the dense rate), "H200 Tensor Core GPU" (SXM).
GPUS = {
    "A100": Limits(312e12, 19.5e12, 2.039e12),
    "H100": Limits(989.5e12, 67e12, 3.35e12),
    "H200": Limits(989.5e12, 67e12, 4.8e12),
}
# Assumptions, not measurements: the part of a limit that kernels reach, and the host's time per launch.
REACHED = {"products": 0.6, "bandwidth": 0.8}
HOST_SECONDS, GRAPH_SECONDS = {"torch": 5e-6, "icae_fast": 20e-6}, 1.5e-6
PROMPT, NEW_TOKENS = 16, 128
# (documents, tokens each) to the paper's seconds with LLaMA-7B, on hardware that its text does not name: plain model,
# compressing, answering from slots (arXiv 2307.06945, table 7).
GRID = {(8, 2048): (24.0, 3.4, 3.9), (8, 512): (9.3, 0.6, 3.7), (32, 512): (24.3, 2.6, 4.2)}


@dataclass(frozen=True)
class Setting:
    """The workload of a prediction.

    Args:
        model: a name in `MODELS`.
        tokens: context tokens of a span.
        slots: slots of a span.
        rank: LoRA rank.
        arch: architecture whose kernel configurations are counted.
    """

    model: str = "llama2-7b"
    tokens: int = 512
    slots: int = 128
    rank: int = 128
    arch: int = 90

    @property
    def shape(self) -> ModelShape:
        """The model's sizes."""
        return MODELS[self.model]


Counts = dict[str, dict[str, Traffic]]  # by op, then by kernel


def layer_counts(setting: Setting, spans: int, last: bool = False) -> Counts:
    """Count the launches of one encoder layer.

    Args:
        setting: the workload.
        spans: spans in the batch.
        last: whether it is the last layer, in which only memory tokens have queries.
    """
    s, span = setting.shape, setting.tokens + setting.slots
    tokens, slots = spans * span, spans * setting.slots
    out = slots if last else tokens
    rows = [(setting.slots if last else span, span)] * spans
    queries = memory_rows(spans, setting.tokens, setting.slots) if last else None
    i = Inputs(torch.float16, "cpu")
    norm = _count(setting, "rms_norm", i.rms_norm(s, tokens))
    after = norm if not last else _count(setting, "rms_norm", i.rms_norm(s, out))
    return {
        "rms_norm": norm,
        "lora_qkv_rope": _count(setting, "lora_qkv_rope", i.lora_qkv_rope(s, tokens, setting.rank, queries)),
        "varlen_attention": _count(setting, "varlen_attention", i.varlen_attention(s, rows)),
        "linear, o": _count(setting, "linear", i.linear(out, s.q_heads * s.head_dim, s.hidden_size)),
        "rms_norm, second": after,
        "swiglu": _count(setting, "swiglu", i.swiglu(s, out)),
        "linear, down": _count(setting, "linear", i.linear(out, s.mlp, s.hidden_size)),
    }


@functools.cache
def step_counts(setting: Setting, rows: int, slots: int, tail: int, layers: int) -> dict[str, Traffic]:
    """Count the launches of a decode step, without the head's product.

    On a CPU that product would make fp32 copies, which it does not on CUDA; `head_traffic` computes it instead.

    Args:
        setting: the workload.
        rows: rows of the batch, each with a separate memory.
        slots: slots of each memory.
        tail: tokens after the slots.
        layers: layers to count.
    """
    segments = [(slots, r, r + 1) for r in range(rows)]
    shape = dataclasses.replace(setting.shape, vocabulary=1)
    return _count(setting, "decode_step", Inputs(torch.float16, "cpu").decode_step(shape, rows, segments, tail, layers))


def head_traffic(s: ModelShape, rows: int) -> Traffic:
    """Return the traffic of the head's product with fp32 results; its launch is counted by `step_counts`."""
    read, written = 2 * s.hidden_size * (s.vocabulary + rows), 4 * rows * s.vocabulary
    return Traffic(0, read, written, read + written, 2 * rows * s.hidden_size * s.vocabulary)


def _count(setting: Setting, op: str, arguments: dict[str, Any]) -> dict[str, Traffic]:
    return counted(lambda: launch(op, arguments), arguments, setting.arch)


def extrapolated(first: Counts, second: Counts, n: int) -> Counts:
    """Return the counts for n spans from those for one and for two."""
    return {op: op_extrapolated(first[op], second[op], n) for op in first}


def op_extrapolated(first: dict[str, Traffic], second: dict[str, Traffic], n: int) -> dict[str, Traffic]:
    """Return the counts of one op for n spans (or layers) from those for one and for two."""
    return {name: first[name] + (second[name] - first[name]) * (n - 1) for name in first}


def gpu_seconds(steps: Iterable[Traffic | Step], gpu: Limits, reached: dict[str, float] = REACHED) -> float:
    """Return the time of consecutive launches, each bound by its operations or its bytes, whichever takes longer."""
    total = 0.0
    for step in steps:
        n_bytes = step.bytes if isinstance(step, Step) else step.read + step.written
        rate = gpu.fp32 if isinstance(step, Step) and step.fp32 else gpu.bf16
        total += max(step.flops / (rate * reached["products"]), n_bytes / (gpu.bandwidth * reached["bandwidth"]))
    return total


def with_host(seconds: float, launches: int, provider: str) -> float:
    """Return the larger of the GPU's time and the host's time to launch."""
    return max(seconds, launches * HOST_SECONDS[provider])


class Prediction:
    """Predicted times of one workload; kernels are counted once.

    Args:
        setting: the workload.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._inner, self._last = (
            (layer_counts(setting, 1, last), layer_counts(setting, 2, last)) for last in (False, True)
        )

    def layer(self, spans: int) -> Counts:
        """Return the counts of an inner layer for `spans` spans in one batch."""
        return extrapolated(*self._inner, spans)

    def encode(self, spans: int, gpu: Limits) -> float:
        """Return the seconds to compress `spans` spans, in the package's micro-batches."""
        per_batch = max(1, token_budget_on(torch.device("cuda")) // (self.setting.tokens + self.setting.slots))
        batches = [per_batch] * (spans // per_batch) + [spans % per_batch] * (spans % per_batch > 0)
        seconds, launches = 0.0, 0
        for batch in batches:
            inner, last = _flat(extrapolated(*self._inner, batch)), _flat(extrapolated(*self._last, batch))
            steps = inner * (self.setting.shape.layers - 1) + last
            seconds, launches = seconds + gpu_seconds(steps, gpu), launches + sum(t.launches for t in steps)
        return with_host(seconds, launches, "icae_fast")

    def decode(self, rows: int, slots: int, gpu: Limits) -> float:
        """Return the seconds of the prefill (by its least work) and of answering in one batch with a CUDA graph."""
        s = self.setting.shape
        reading = encode_flops(s, [slots] * rows, PROMPT, 0) / (gpu.bf16 * REACHED["products"])
        tail = PROMPT + NEW_TOKENS // 2
        one, two = (step_counts(self.setting, rows, slots, tail, layers) for layers in (1, 2))
        steps = [*op_extrapolated(one, two, s.layers).values(), head_traffic(s, rows)]
        seconds = sum(gpu_seconds([t], gpu) for t in steps) + sum(t.launches for t in steps) * GRAPH_SECONDS
        return reading + (NEW_TOKENS - 1) * seconds

    def encode_unfused(self, spans: int, gpu: Limits, batch: int = 1) -> float:
        """Return the seconds of PEFT's launches with `batch` spans at once; the reference runs one at a time."""
        s, span = self.setting.shape, self.setting.tokens + self.setting.slots
        return spans // batch * _unfused(s, [(span, span)] * batch, self.setting.rank, span * batch, gpu)

    def decode_unfused(self, rows: int, slots: int, gpu: Limits, batch: int = 1) -> float:
        """Return the seconds of PEFT's prefill and decoding with `batch` documents at once; the reference runs one."""
        s, keys = self.setting.shape, slots + PROMPT
        reading = _unfused(s, [(keys, keys)] * batch, 0, keys * batch, gpu)
        step = _unfused(s, [(1, keys + NEW_TOKENS // 2)] * batch, 0, batch, gpu)
        return rows // batch * (reading + (NEW_TOKENS - 1) * step)


def _flat(counts: Counts) -> list[Traffic]:
    return [traffic for kernels in counts.values() for traffic in kernels.values()]


def _unfused(s: ModelShape, rows: list[tuple[int, int]], rank: int, tokens: int, gpu: Limits) -> float:
    steps = unfused_layer(s, rows, rank) * s.layers + unfused_head(s, tokens)
    return with_host(gpu_seconds(steps, gpu), sum(step.launches for step in steps), "torch")


def layer_rows(prediction: Prediction, spans: int) -> list[dict[str, Any]]:
    """Return the rows of one layer's kernels."""
    rows = []
    for op, kernels in prediction.layer(spans).items():
        for name, traffic in kernels.items():
            times = {g: _digits(gpu_seconds([traffic], gpu, dict.fromkeys(REACHED, 1.0)) * 1e6) for g, gpu in GPUS.items()}  # noqa: E501  # fmt: skip
            rows.append({"op": op, "kernel": name, **asdict(traffic), "limit_us": times})
    return rows


def unfused_rows(setting: Setting, spans: int) -> list[dict[str, Any]]:
    """Return the rows of PEFT's launches for one layer."""
    span = setting.tokens + setting.slots
    steps = unfused_layer(setting.shape, [(span, span)] * spans, setting.rank)
    return [asdict(step) for step in steps]


def grid_rows(prediction: Prediction) -> list[dict[str, Any]]:
    """Return the rows of the paper's grid on each GPU; decoding is None if no kernel serves it."""
    rows, setting = [], prediction.setting
    decodes = REGISTRY["decode_step"].gpu is not None
    for (documents, tokens), published in GRID.items():
        per_document = -(-tokens // setting.tokens)
        spans, slots = documents * per_document, per_document * setting.slots
        for name, gpu in GPUS.items():
            rows.append({
                "documents": documents, "tokens": tokens, "gpu": name,
                "encode_s": _digits(prediction.encode(spans, gpu)),
                "decode_s": _digits(prediction.decode(documents, slots, gpu)) if decodes else None,
                "reference_encode_s": _digits(prediction.encode_unfused(spans, gpu)),
                "reference_decode_s": _digits(prediction.decode_unfused(documents, slots, gpu)),
                "batched_encode_s": _digits(prediction.encode_unfused(spans, gpu, spans)),
                "batched_decode_s": _digits(prediction.decode_unfused(documents, slots, gpu, documents)),
                "published_s": dict(zip(("plain", "encode", "decode"), published, strict=True)),
            })  # fmt: skip
    return rows


def _digits(value: float) -> float:
    return float(f"{value:.3g}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels.predict", description=__doc__)
    parser.add_argument("--model", choices=sorted(MODELS), default="llama2-7b")
    parser.add_argument("--output", type=Path, default=RESULTS, help="output folder")
    parser.add_argument("--spans", type=int, default=8, help="spans in the table of one layer (%(default)s)")
    options = parser.parse_args(arguments)
    if not INTERPRETED:
        print("Counting needs Triton's interpreter; set TRITON_INTERPRET=1.", file=sys.stderr)
        return 2
    setting = Setting(options.model)
    prediction = Prediction(setting)
    result = {
        "note": NOTE, "setting": asdict(setting), "gpus": {n: asdict(g) for n, g in GPUS.items()},
        "assumptions": {"reached": REACHED, "host_s": HOST_SECONDS, "graph_s": GRAPH_SECONDS, "prompt": PROMPT,
                        "new_tokens": NEW_TOKENS},
        "spans": options.spans, "layer": layer_rows(prediction, options.spans),
        "unfused": unfused_rows(setting, options.spans), "grid": grid_rows(prediction),
    }  # fmt: skip
    path = options.output / f"predicted-{options.model}.json"
    write_json(path, result)
    print(f"wrote {path.name}. {NOTE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
