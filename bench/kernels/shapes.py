"""Inputs of every op at the sizes of real models.

`calls()` lists what `bench.kernels.check` compiles: the workloads below, and for each op that is in none of them the
sample `smollm2` of its spec. `bench.kernels.predict` counts the inputs of one layer.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from bench.harness.shapes import MODELS
from icae_fast.benchmark.shapes import ModelShape
from icae_fast.ops import REGISTRY, OpSpec, Sample
from icae_fast.ops._lengths import remember

SPANS, TOKENS, SLOTS, RANK = 4, 512, 128, 128
HEAD_SIZES = (64, 80, 96, 128, 256)
PROMPT = 16
MODEL_SAMPLE = "smollm2"  # name of the sample at the sizes of SmolLM2-135M


@dataclass(frozen=True)
class Call:
    """A call of an op.

    Args:
        name: its purpose, e.g. "llama2-7b encode".
        op: name in the registry.
        make: returns the arguments by name.
    """

    name: str
    op: str
    make: Callable[[Inputs], dict[str, Any]]

    def launch(self, dtype: torch.dtype, device: str = "meta") -> Any:
        """Call the op's GPU launcher with inputs in `dtype` on `device` and return its result."""
        return launch(self.op, self.make(Inputs(dtype, device)))


def launch(op: str, arguments: dict[str, Any]) -> Any:
    """Call an op's GPU launcher directly, on any device."""
    spec = REGISTRY[op]
    assert spec.gpu is not None, f"the op {op!r} has no GPU launcher"
    module, function = spec.gpu.launcher.split(":")
    with torch.no_grad():
        return getattr(importlib.import_module(module), function)(*(arguments[n] for n in spec.argument_names))


def label(kernel: Any) -> str:
    """Return a kernel's name, e.g. `rms_norm.forward`, or `rms_norm_backward.dx` for `triton_cuda_backward.py`."""
    *_, folder, module = kernel.function.fn.__module__.split(".")
    return f"{folder}{module.removeprefix('triton_cuda')}.{kernel.name.lstrip('_')}"


@dataclass(frozen=True)
class Inputs:
    """A maker of op arguments in one dtype on one device.

    Each method named after an op returns that op's arguments by name.

    Args:
        dtype: dtype of floating-point tensors.
        device: device of all tensors.
        generator: draws floating-point values, on `device`; None makes them zero.
    """

    dtype: torch.dtype
    device: str
    generator: torch.Generator | None = None

    def floats(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return values of standard deviation 0.1, small enough for products of products in fp16."""
        dtype = dtype or self.dtype
        if self.generator is None:
            return torch.zeros(shape, dtype=dtype, device=self.device)
        return torch.randn(shape, dtype=dtype, device=self.device, generator=self.generator) * 0.1

    def ints(self, values: Sequence[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
        """Return integers whose values the host may not read back."""
        return torch.tensor(values, dtype=dtype, device=self.device)

    def starts(self, lengths: Sequence[int]) -> torch.Tensor:
        """Return the cu_seqlens of rows of these lengths, whose values the host knows."""
        values = [0, *accumulate(lengths)]
        return remember(self.ints(values), values)

    def rms_norm(self, s: ModelShape, tokens: int, residual: bool = True) -> dict[str, Any]:
        """Return the arguments of a norm over `tokens` rows."""
        x = self.floats(tokens, s.hidden_size)
        other = self.floats(tokens, s.hidden_size) if residual else None
        return {"x": x, "residual": other, "weight": self.floats(s.hidden_size), "eps": 1e-5}

    def rms_norm_backward(self, s: ModelShape, tokens: int, residual: bool = True) -> dict[str, Any]:
        """Return the arguments of the norm's backward."""
        forward = self.rms_norm(s, tokens, residual)
        rest = {"total": self.floats(tokens, s.hidden_size), "weight": forward["weight"], "eps": 1e-5}
        return {"dy": forward["x"], "dsum": forward["residual"], **rest}

    def lora_qkv_rope(
        self, s: ModelShape, tokens: int, rank: int = RANK, queries: Sequence[int] | None = None,
        dropout: float = 0.0, norm: bool = False, bias: bool = False,
    ) -> dict[str, Any]:  # fmt: skip
        """Return the arguments of the projections of `tokens` rows; `queries` are the rows that need a query."""
        d, q, kv = s.hidden_size, s.q_heads * s.head_dim, s.kv_heads * s.head_dim
        cos, sin = (self.floats(tokens, s.head_dim // 2, dtype=torch.float32) for _ in range(2))
        return {
            "x": self.floats(tokens, d), "weight": self.floats(q + 2 * kv, d),
            "bias": self.floats(q + 2 * kv) if bias else None,
            "lora_a": self.floats(2 * rank, d) if rank else None,
            "lora_b": self.floats(q + kv, rank) if rank else None,
            "cos": cos, "sin": sin, "qk_norm": self.floats(2, s.head_dim) if norm else None,
            "q_rows": None if queries is None else self.ints(queries, torch.int64),
            "dropout_seed": torch.tensor(7, device=self.device) if dropout else None,
            "num_q_heads": s.q_heads, "num_kv_heads": s.kv_heads, "lora_scale": 0.25, "norm_eps": 1e-6,
            "dropout_p": dropout,
        }  # fmt: skip

    def lora_qkv_rope_backward(self, s: ModelShape, tokens: int, **options: Any) -> dict[str, Any]:
        """Return the arguments of the projections' backward."""
        forward = self.lora_qkv_rope(s, tokens, **options)
        queries = options.get("queries")
        dq = self.floats(tokens if queries is None else len(queries), s.q_heads, s.head_dim)
        dk, dv = (self.floats(tokens, s.kv_heads, s.head_dim) for _ in range(2))
        return {"dq": dq, "dk": dk, "dv": dv, **forward}

    def varlen_attention(
        self, s: ModelShape, rows: Sequence[tuple[int, int]], window: int = 0, used: Sequence[int] | None = None
    ) -> dict[str, Any]:
        """Return the arguments of attention over rows of (queries, keys); `used` counts the valid keys per row."""
        q, k = ([row[side] for row in rows] for side in (0, 1))
        return {
            "q": self.floats(sum(q), s.q_heads, s.head_dim), "k": self.floats(sum(k), s.kv_heads, s.head_dim),
            "v": self.floats(sum(k), s.kv_heads, s.head_dim), "cu_seqlens_q": self.starts(q),
            "cu_seqlens_k": self.starts(k), "seqused_k": None if used is None else self.ints(used),
            "max_seqlen_q": max(q), "max_seqlen_k": max(k), "scale": s.head_dim**-0.5, "window": window,
        }  # fmt: skip

    def varlen_attention_backward(
        self, s: ModelShape, rows: Sequence[tuple[int, int]], **options: Any
    ) -> dict[str, Any]:
        """Return the arguments of attention's backward."""
        forward = self.varlen_attention(s, rows, **options)
        tensors = {name: forward.pop(name) for name in "qkv"}
        out, lse = self.floats(*tensors["q"].shape), self.floats(*tensors["q"].shape[1::-1], dtype=torch.float32)
        return {"dout": self.floats(*out.shape), "dlse": self.floats(*lse.shape, dtype=lse.dtype), **tensors, "out": out, "lse": lse, **forward}  # noqa: E501  # fmt: skip

    def swiglu(self, s: ModelShape, tokens: int, keep: bool = False, bias: bool = False) -> dict[str, Any]:
        """Return the arguments of the gated half of an MLP."""
        weight = self.floats(2 * s.mlp, s.hidden_size)
        return {
            "x": self.floats(tokens, s.hidden_size), "weight": weight,
            "bias": self.floats(2 * s.mlp) if bias else None, "keep": keep,
        }  # fmt: skip

    def swiglu_backward(self, s: ModelShape, tokens: int, kept: bool = True) -> dict[str, Any]:
        """Return the arguments of swiglu's backward, with the forward's kept values or without."""
        forward = self.swiglu(s, tokens)
        forward.pop("keep")
        gate_up = self.floats(tokens, 2 * s.mlp) if kept else self.floats(0)
        return {"dy": self.floats(tokens, s.mlp), **forward, "gate_up": gate_up}

    def linear(self, tokens: int, inner: int, outer: int) -> dict[str, Any]:
        """Return the arguments of a projection from `inner` to `outer` features."""
        return {"x": self.floats(tokens, inner), "weight": self.floats(outer, inner), "bias": None}

    def _prefixes(
        self, s: ModelShape, rows: int, segments: Sequence[tuple[int, int, int]], tail: int,
        leading: tuple[int, ...] = (),
    ) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:  # fmt: skip
        shape = (*leading, s.kv_heads, s.head_dim)
        at = len(leading)

        def cache(n: int) -> torch.Tensor:
            return self.floats(*shape[:at], n, *shape[at:])

        keys = [cache(n) for n, _, _ in segments]
        return {
            "tail_starts": self.ints([r * tail for r in range(rows)]), "tail_lengths": self.ints([tail] * rows),
            "prefix_keys": keys, "prefix_values": [self.floats(*k.shape) for k in keys],
            "prefix_rows": [i for _, begin, end in segments for i in (begin, end)],
        }, cache(rows * tail), cache(rows * tail)  # fmt: skip

    def shared_prefix_attention(
        self, s: ModelShape, rows: int, segments: Sequence[tuple[int, int, int]], tail: int, queries: int = 1,
        window: int = 0,
    ) -> dict[str, Any]:  # fmt: skip
        """Return the arguments for `rows` rows of `queries` queries.

        Segments are (keys, first row, end row), and every row has a tail of `tail` keys.
        """
        prefixes, k, v = self._prefixes(s, rows, segments, tail)
        q = self.floats(rows * queries, s.q_heads, s.head_dim)
        cu = self.starts([queries] * rows)
        rest = {"scale": s.head_dim**-0.5, "window": window}
        return {"q": q, "k": k, "v": v, "cu_seqlens_q": cu, **prefixes, **rest}

    def decode_step(
        self, s: ModelShape, rows: int, segments: Sequence[tuple[int, int, int]], tail: int, layers: int = 1,
        norm: bool = False,
    ) -> dict[str, Any]:  # fmt: skip
        """Return the arguments of a decode step of `rows` rows; segments and tail as in `shared_prefix_attention`."""
        d, q, kv = s.hidden_size, s.q_heads * s.head_dim, s.kv_heads * s.head_dim
        prefixes, keys, values = self._prefixes(s, rows, segments, tail, (layers,))
        shapes = [(q + 2 * kv, d), (d, q), (2 * s.mlp, d), (d, s.mlp)] * layers
        cos, sin = (self.floats(rows, s.head_dim // 2, dtype=torch.float32) for _ in range(2))
        return {
            "tokens": self.ints([0] * rows, torch.int64), "embedding": self.floats(s.vocabulary, d),
            "norms": [self.floats(d) for _ in range(2 * layers + 1)],
            "matrices": [self.floats(*shape) for shape in shapes], "biases": [None] * len(shapes),
            "qk_norms": [self.floats(2, s.head_dim) if norm else None for _ in range(layers)],
            "head": self.floats(s.vocabulary, d), "cos": cos, "sin": sin, "tail_keys": keys,
            "tail_values": values, **prefixes, "num_q_heads": s.q_heads, "num_kv_heads": s.kv_heads,
            "scale": s.head_dim**-0.5, "norm_eps": 1e-5, "windows": [0] * layers,
        }  # fmt: skip


def memory_rows(spans: int, tokens: int = TOKENS, slots: int = SLOTS) -> list[int]:
    """Return the rows of a packed batch that are memory tokens."""
    return [i * (tokens + slots) + tokens + j for i in range(spans) for j in range(slots)]


def calls() -> list[Call]:
    """Return every call whose kernels are compiled."""
    listed = [c for name in ("llama2-7b", "smollm2-135m") for c in (*_encode(name), *_train(name), *_decode(name))]
    listed += [*_qk_norm("qwen3-0.6b"), *(c for size in HEAD_SIZES for c in _head_size(size))]
    in_workloads = {c.op for c in listed}
    return [*listed, *(c for spec in REGISTRY.values() if spec.name not in in_workloads for c in sample_calls(spec))]


def sample_calls(spec: OpSpec) -> list[Call]:
    """Return the call of an op's GPU launcher with its sample `smollm2`; none without a launcher or such a sample."""

    def call(sample: Sample) -> Call:
        def make(inputs: Inputs) -> dict[str, Any]:
            return sample.make(inputs.dtype, torch.device(inputs.device), torch.Generator().manual_seed(0))

        return Call(f"sample {sample.name}", spec.name, make)

    return [call(sample) for sample in spec.samples if spec.gpu is not None and sample.name == MODEL_SAMPLE]


def _call(name: str, op: str, *args: Any, method: str | None = None, **options: Any) -> Call:
    return Call(name, op, lambda inputs: getattr(inputs, method or op)(*args, **options))


def _encode(name: str) -> Iterator[Call]:
    s, tokens, queries = MODELS[name], SPANS * (TOKENS + SLOTS), memory_rows(SPANS)
    full, last = [(TOKENS + SLOTS,) * 2] * SPANS, [(SLOTS, TOKENS + SLOTS)] * SPANS
    yield _call(f"{name} encode", "rms_norm", s, tokens)
    yield _call(f"{name} encode, first norm", "rms_norm", s, tokens, residual=False)
    yield _call(f"{name} encode", "lora_qkv_rope", s, tokens)
    yield _call(f"{name} encode, last layer", "lora_qkv_rope", s, tokens, queries=queries)
    yield _call(f"{name} read", "lora_qkv_rope", s, tokens, rank=0)
    yield _call(f"{name} encode", "varlen_attention", s, full)
    yield _call(f"{name} encode, last layer", "varlen_attention", s, last)
    yield _call(f"{name} encode, window", "varlen_attention", s, full, window=256)
    yield _call(f"{name} read a prompt", "varlen_attention", s, [(PROMPT, 4 * SLOTS + PROMPT)] * SPANS)
    yield _call(f"{name} encode", "swiglu", s, tokens)
    yield _call(f"{name} encode", "linear", tokens, s.q_heads * s.head_dim, s.hidden_size)


def _train(name: str) -> Iterator[Call]:
    s, tokens, queries = MODELS[name], SPANS * (TOKENS + SLOTS), memory_rows(SPANS)
    full, last = [(TOKENS + SLOTS,) * 2] * SPANS, [(SLOTS, TOKENS + SLOTS)] * SPANS
    yield _call(f"{name} train", "lora_qkv_rope", s, tokens, dropout=0.05)
    yield _call(f"{name} train", "swiglu", s, tokens, keep=True)
    yield _call(f"{name} train", "rms_norm_backward", s, tokens)
    yield _call(f"{name} train, first norm", "rms_norm_backward", s, tokens, residual=False)
    yield _call(f"{name} train", "lora_qkv_rope_backward", s, tokens)
    yield _call(f"{name} train, dropout", "lora_qkv_rope_backward", s, tokens, dropout=0.05)
    yield _call(f"{name} train, last layer", "lora_qkv_rope_backward", s, tokens, queries=queries)
    yield _call(f"{name} train, decoder", "lora_qkv_rope_backward", s, tokens, rank=0)
    yield _call(f"{name} train", "varlen_attention_backward", s, full)
    yield _call(f"{name} train, last layer", "varlen_attention_backward", s, last)
    yield _call(f"{name} train", "swiglu_backward", s, tokens)
    yield _call(f"{name} train, recomputed", "swiglu_backward", s, tokens, kept=False)


def _decode(name: str) -> Iterator[Call]:
    s = MODELS[name]
    for rows in (1, 16):
        segments, what = [(4 * SLOTS, 0, rows)], f"{name} decode {rows}"
        yield _call(what, "shared_prefix_attention", s, rows, segments, 48)
        yield _call(what, "decode_step", s, rows, segments, 48, layers=2)
    segments = [(4 * SLOTS, 0, 16)]
    yield _call(f"{name} read prompts", "shared_prefix_attention", s, 16, segments, PROMPT, queries=PROMPT)


def _qk_norm(name: str) -> Iterator[Call]:
    s, tokens = MODELS[name], SPANS * (TOKENS + SLOTS)
    yield _call(f"{name} encode", "lora_qkv_rope", s, tokens, norm=True)
    yield _call(f"{name} encode, last layer", "lora_qkv_rope", s, tokens, norm=True, queries=memory_rows(SPANS))
    yield _call(f"{name} train", "lora_qkv_rope_backward", s, tokens, norm=True)
    yield _call(f"{name} decode 16", "decode_step", s, 16, [(4 * SLOTS, 0, 16)], 48, layers=2, norm=True)


def _head_size(size: int) -> Iterator[Call]:
    s = ModelShape(f"heads of {size}", 2048, 1, 8, 2, size, 4096, 32000)
    rows = {"": [(TOKENS + SLOTS,) * 2] * SPANS, ", last layer": [(SLOTS, TOKENS + SLOTS)] * SPANS}
    for what, lengths in rows.items():
        yield _call(f"{s.name}{what}", "varlen_attention", s, lengths)
        yield _call(f"{s.name}{what}", "varlen_attention_backward", s, lengths)
    yield _call(f"{s.name}, window", "varlen_attention", s, rows[""], window=256)
    tokens = SPANS * (TOKENS + SLOTS)
    yield _call(s.name, "lora_qkv_rope", s, tokens)
    yield _call(s.name, "lora_qkv_rope_backward", s, tokens)
    yield _call(s.name, "shared_prefix_attention", s, 16, [(4 * SLOTS, 0, 16)], 48)
