"""What compressing and answering cost on paper: `TRITON_INTERPRET=1 python -m bench.kernels.predict`.

Every kernel's bytes and operations are counted in Triton's interpreter from its own loads, stores and products at the
model's real widths, for one span and for two; the rest is a straight line, since all of encoding is linear in spans.
Against published limits of GPUs that gives times. They are PREDICTIONS: nothing here has run on a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.harness.shapes import MODELS, encode_flops
from bench.kernels.count import Traffic, counted
from bench.kernels.shapes import Inputs, launch, memory_rows
from bench.kernels.unfused import Step, unfused_head, unfused_layer
from icae_fast.backbone.rows import token_budget_on
from icae_fast.benchmark.machine import REPOSITORY
from icae_fast.benchmark.shapes import ModelShape
from icae_fast.ops import REGISTRY
from icae_fast.ops._triton import INTERPRETED

NOTE = "Predictions: counted on paper and divided by published limits. Nothing here was measured on a GPU."


@dataclass(frozen=True)
class Limits:
    """Dense bf16 and plain fp32 operations a second, and bytes a second."""

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
# Assumptions, none of them measured: which part of a limit kernels reach, and what a launch costs the host.
REACHED = {"products": 0.6, "bandwidth": 0.8}
HOST_SECONDS, GRAPH_SECONDS = {"torch": 5e-6, "icae_fast": 20e-6}, 1.5e-6
PROMPT, NEW_TOKENS = 16, 128
# Documents and their tokens, and the paper's seconds with LLaMA-7B on hardware that it does not name in the text: of
# the plain model, of compressing and of answering from slots (arXiv 2307.06945, table 7).
GRID = {(8, 2048): (24.0, 3.4, 3.9), (8, 512): (9.3, 0.6, 3.7), (32, 512): (24.3, 2.6, 4.2)}


@dataclass(frozen=True)
class Setting:
    """What is looked at: a model, spans of `tokens` into `slots` at a LoRA rank, and for which GPU's configurations."""

    model: str = "llama2-7b"
    tokens: int = 512
    slots: int = 128
    rank: int = 128
    arch: int = 90

    @property
    def shape(self) -> ModelShape:
        """The model's sizes."""
        return MODELS[self.model]


Counts = dict[str, dict[str, Traffic]]  # by op, and by kernel


def layer_counts(setting: Setting, spans: int, last: bool = False) -> Counts:
    """What each op of one encoder layer launches; `last` is the layer where only memory tokens have queries."""
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
    """What a token step launches for rows that have a memory of so many slots each, but for the head's product.

    A CPU would make fp32 copies for that, which CUDA does not; see `head_traffic`.
    """
    segments = [(slots, r, r + 1) for r in range(rows)]
    shape = dataclasses.replace(setting.shape, vocabulary=1)
    return _count(setting, "decode_step", Inputs(torch.float16, "cpu").decode_step(shape, rows, segments, tail, layers))


def head_traffic(s: ModelShape, rows: int) -> Traffic:
    """The head's product with fp32 results; its launch is in `step_counts`."""
    read, written = 2 * s.hidden_size * (s.vocabulary + rows), 4 * rows * s.vocabulary
    return Traffic(0, read, written, read + written, 2 * rows * s.hidden_size * s.vocabulary)


def _count(setting: Setting, op: str, arguments: dict[str, Any]) -> dict[str, Traffic]:
    return counted(lambda: launch(op, arguments), arguments, setting.arch)


def line(first: Counts, second: Counts, n: int) -> Counts:
    """Counts for n spans from those for one and for two."""
    return {op: along(first[op], second[op], n) for op in first}


def along(first: dict[str, Traffic], second: dict[str, Traffic], n: int) -> dict[str, Traffic]:
    """The same of one op."""
    return {name: first[name] + (second[name] - first[name]) * (n - 1) for name in first}


def gpu_seconds(steps: Iterable[Traffic | Step], gpu: Limits, reached: dict[str, float] = REACHED) -> float:
    """The time of launches one after another, each bound by its operations or by its bytes, whichever takes longer."""
    total = 0.0
    for step in steps:
        n_bytes = step.bytes if isinstance(step, Step) else step.read + step.written
        rate = gpu.fp32 if isinstance(step, Step) and step.fp32 else gpu.bf16
        total += max(step.flops / (rate * reached["products"]), n_bytes / (gpu.bandwidth * reached["bandwidth"]))
    return total


def with_host(seconds: float, launches: int, provider: str) -> float:
    """The time of launches that the host makes one by one, meanwhile."""
    return max(seconds, launches * HOST_SECONDS[provider])


class Prediction:
    """Times of one model, from counts that are made once.

    Args:
        setting: what is looked at.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._inner, self._last = ([layer_counts(setting, n, last) for n in (1, 2)] for last in (False, True))

    def layer(self, spans: int) -> Counts:
        """An inner layer for so many spans in one batch."""
        return line(*self._inner, spans)

    def encode(self, spans: int, gpu: Limits) -> float:
        """Seconds to compress so many spans, in micro-batches of the package's own size."""
        per_batch = max(1, token_budget_on(torch.device("cuda")) // (self.setting.tokens + self.setting.slots))
        batches = [per_batch] * (spans // per_batch) + [spans % per_batch] * (spans % per_batch > 0)
        seconds, launches = 0.0, 0
        for batch in batches:
            inner, last = _flat(line(*self._inner, batch)), _flat(line(*self._last, batch))
            steps = inner * (self.setting.shape.layers - 1) + last
            seconds, launches = seconds + gpu_seconds(steps, gpu), launches + sum(t.launches for t in steps)
        return with_host(seconds, launches, "icae_fast")

    def decode(self, rows: int, slots: int, gpu: Limits) -> float:
        """Seconds to read slots and prompts, by the least work, and to answer in one batch under a CUDA graph."""
        s = self.setting.shape
        reading = encode_flops(s, [slots] * rows, PROMPT, 0) / (gpu.bf16 * REACHED["products"])
        tail = PROMPT + NEW_TOKENS // 2
        one, two = (step_counts(self.setting, rows, slots, tail, layers) for layers in (1, 2))
        steps = [*along(one, two, s.layers).values(), head_traffic(s, rows)]
        seconds = sum(gpu_seconds([t], gpu) for t in steps) + sum(t.launches for t in steps) * GRAPH_SECONDS
        return reading + (NEW_TOKENS - 1) * seconds

    def encode_unfused(self, spans: int, gpu: Limits, batch: int = 1) -> float:
        """Seconds of PEFT's launches, so many spans at once; the reference takes one."""
        s, span = self.setting.shape, self.setting.tokens + self.setting.slots
        return spans // batch * _unfused(s, [(span, span)] * batch, self.setting.rank, span * batch, gpu)

    def decode_unfused(self, rows: int, slots: int, gpu: Limits, batch: int = 1) -> float:
        """Seconds to read slots and prompts and to answer, so many documents at once; the reference takes one."""
        s, keys = self.setting.shape, slots + PROMPT
        reading = _unfused(s, [(keys, keys)] * batch, 0, keys * batch, gpu)
        step = _unfused(s, [(1, keys + NEW_TOKENS // 2)] * batch, 0, batch, gpu)
        return rows // batch * (reading + (NEW_TOKENS - 1) * step)


def _flat(counts: Counts) -> list[Traffic]:
    return [traffic for kernels in counts.values() for traffic in kernels.values()]


def _unfused(s, rows, rank, tokens, gpu):
    steps = unfused_layer(s, rows, rank) * s.layers + unfused_head(s, tokens)
    return with_host(gpu_seconds(steps, gpu), sum(step.launches for step in steps), "torch")


def layer_rows(prediction: Prediction, spans: int) -> list[dict[str, Any]]:
    """One layer of our kernels, a row for each."""
    rows = []
    for op, kernels in prediction.layer(spans).items():
        for name, traffic in kernels.items():
            times = {g: _digits(gpu_seconds([traffic], gpu, dict.fromkeys(REACHED, 1.0)) * 1e6) for g, gpu in GPUS.items()}  # noqa: E501  # fmt: skip
            rows.append({"op": op, "kernel": name, **asdict(traffic), "limit_us": times})
    return rows


def unfused_rows(setting: Setting, spans: int) -> list[dict[str, Any]]:
    """One layer of PEFT's, likewise."""
    span = setting.tokens + setting.slots
    steps = unfused_layer(setting.shape, [(span, span)] * spans, setting.rank)
    return [asdict(step) for step in steps]


def grid_rows(prediction: Prediction) -> list[dict[str, Any]]:
    """The paper's grid on each GPU; decoding is left out where no kernel serves it."""
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
    """The command; gives its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels.predict", description=__doc__)
    parser.add_argument("--model", choices=sorted(MODELS), default="llama2-7b")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "docs" / "results", help="folder")
    parser.add_argument("--spans", type=int, default=8, help="of the table of one layer")
    options = parser.parse_args(arguments)
    if not INTERPRETED:
        print("Counting wants Triton's interpreter: set TRITON_INTERPRET=1.", file=sys.stderr)
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
    path = options.output / f"paper-{options.model}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path.name}. {NOTE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
