"""Model shapes and workloads of all benchmarks, and the operations that each of them needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from icae_fast.benchmark.shapes import ModelShape

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


MODELS = {
    shape.name: shape
    for shape in (
        ModelShape("tiny", 64, 3, 4, 2, 16, 128, 512),
        ModelShape("smollm2-135m", 576, 30, 9, 3, 64, 1536, 49152, bundled=True),
        ModelShape("smollm2-135m-random", 576, 30, 9, 3, 64, 1536, 49152),
        ModelShape("llama-1b", 2048, 16, 32, 8, 64, 8192, 32000),
        ModelShape("llama2-7b", 4096, 32, 32, 32, 128, 11008, 32000),
        ModelShape("qwen3-0.6b", 1024, 28, 16, 8, 128, 3072, 151936),
    )
}


@dataclass(frozen=True)
class Case:
    """A model and its workload.

    Args:
        model: a name in `MODELS`.
        dtype: a name in `DTYPES`.
        documents: number of documents.
        tokens: tokens of each document.
        memory_size, rate, rank: k, context tokens per slot, LoRA rank.
        prompts: prompts asked about each document, in benchmarks that decode.
        new_tokens: tokens generated per prompt; in training, tokens of the continuation.
        threads: torch threads, 0 for torch's default.
    """

    model: str
    dtype: str
    documents: int
    tokens: int
    memory_size: int = 128
    rate: int = 4
    rank: int = 128
    prompts: int = 1
    new_tokens: int = 32
    threads: int = 0

    @property
    def name(self) -> str:
        """A readable id, `model-dtype-DOCUMENTSxTOKENS`, with the threads if they are set."""
        threads = f"-{self.threads}t" if self.threads else ""
        return f"{self.model}-{self.dtype}-{self.documents}x{self.tokens}{threads}"

    @property
    def shape(self) -> ModelShape:
        """The model's sizes."""
        return MODELS[self.model]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype."""
        return DTYPES[self.dtype]

    @property
    def element_size(self) -> int:
        """Bytes of an element."""
        return self.torch_dtype.itemsize

    @property
    def span_lengths(self) -> list[int]:
        """Tokens of each span of all documents, by the reference's rule."""
        n = -(-self.tokens // (self.memory_size * self.rate))
        step = -(-self.tokens // n)
        return [min(step, self.tokens - start) for start in range(0, self.tokens, step)] * self.documents


@dataclass(frozen=True)
class OverfitCase:
    """Passages that a new adapter is overfitted on.

    Args:
        model, dtype: as in `Case`.
        passages: number of passages, one span each.
        tokens: tokens of each passage.
        memory_size: k, slots per passage.
        warm_steps: steps of the encoder-only warm start.
        max_steps: maximum number of autoencoding steps.
        goal: the loss below which all passages must be restored exactly; None runs all steps unconditionally.
    """

    model: str
    dtype: str
    passages: int
    tokens: int
    memory_size: int
    warm_steps: int
    max_steps: int
    goal: float | None

    @property
    def name(self) -> str:
        """A readable id, `model-dtype-PASSAGESxTOKENSintoSLOTS`."""
        return f"{self.model}-{self.dtype}-{self.passages}x{self.tokens}into{self.memory_size}"


@dataclass(frozen=True)
class Rows:
    """A batch for the attention benchmark.

    Args:
        count: number of rows.
        tokens: tokens of each row.
    """

    count: int
    tokens: int

    @property
    def name(self) -> str:
        """A readable id, `ROWSxTOKENS`."""
        return f"{self.count}x{self.tokens}"


def _tiny(documents: int, tokens: int, rate: int = 4, threads: int = 0, new_tokens: int = 4, prompts: int = 1) -> Case:
    sizes = {"memory_size": 8, "rate": rate, "rank": 8}
    return Case("tiny", "fp32", documents, tokens, **sizes, threads=threads, new_tokens=new_tokens, prompts=prompts)


def _smollm2(documents: int, tokens: int, rate: int = 4, threads: int = 0, **asked: int) -> Case:
    return Case("smollm2-135m", "bf16", documents, tokens, rate=rate, threads=threads, **asked)


def _llama(documents: int, threads: int = 0) -> Case:
    return Case("llama-1b", "bf16", documents, 512, threads=threads)


# The choices of `--workload`: a benchmark runs for every case of the list.
WORKLOADS = {
    "small": [_tiny(1, 40), _tiny(2, 64)],
    "real": [_smollm2(1, 512), _smollm2(4, 512)],
    "big": [_smollm2(8, 512), _smollm2(2, 4096), _llama(1), _llama(4)],
}

# For `bench_encode.py`.
ENCODE_WORKLOADS = {
    "small": [_tiny(2, 32)],
    "real": [_smollm2(4, 512), _smollm2(8, 512)],
    "big": [_smollm2(4, 512), _smollm2(8, 512)],
}
# For `bench_encode_shapes.py`: another model and other span lengths. With k = 128 and rate 63 a document of 8064 tokens
# is one span, which with its memory tokens fills SmolLM2's 8192 positions.
SHAPE_WORKLOADS = {
    "small": [_tiny(1, 64, rate=8), _tiny(3, 8, rate=1, threads=1)],
    "real": [_llama(1, 2), _smollm2(1, 8064, 63, 2), _smollm2(64, 128, 1, 2)],
    "big": [
        *(_llama(documents, threads) for documents in (1, 4) for threads in (1, 2)),
        *(_smollm2(1, 8064, 63, threads) for threads in (1, 2)),
        *(_smollm2(64, 128, 1, threads) for threads in (1, 2)),
    ],
}
# Cases with a growing number of spans, for the growth of time and memory.
GROWTH_WORKLOADS = {
    "small": [tuple(_tiny(n, 32) for n in (1, 2, 4))],
    "real": [tuple(_smollm2(n, 512) for n in (1, 2, 4, 8, 16, 32, 64))],
    "big": [tuple(_smollm2(n, 512) for n in (1, 2, 4, 8, 16, 32, 64))],
}
# For `bench_decode.py`: one prompt about a memory whose keys and values exist, and a long answer.
DECODE_WORKLOADS = {
    "small": [_tiny(1, 40)],
    "real": [_smollm2(1, 512, new_tokens=128)],
    "big": [_smollm2(1, 512, new_tokens=128)],
}
# For `bench_decode_questions.py`: many prompts about one document, compressing included.
QUESTION_WORKLOADS = {
    "small": [_tiny(1, 64, prompts=4)],
    "real": [_smollm2(1, 4096, prompts=16)],
    "big": [_smollm2(1, 4096, prompts=16)],
}
# For `bench_decode_first_token.py`: one token from a stored memory.
FIRST_TOKEN_WORKLOADS = {
    "small": [_tiny(1, 64, new_tokens=1)],
    "real": [_smollm2(1, 4096, new_tokens=1)],
    "big": [_smollm2(1, 4096, new_tokens=1)],
}
# For `bench_train.py`: one autoencoding step on one document.
TRAIN_WORKLOADS = {
    "small": [_tiny(1, 80)],
    "real": [_smollm2(1, 2048)],
    "big": [_smollm2(1, 2048), _smollm2(1, 4096)],
}
# For `bench_train_memory.py`: continuation steps on documents of growing length. 60 spans make 7,680 slots, which with
# 512 target tokens fill SmolLM2's 8,192 positions; hence 30,720 tokens instead of 32,768.
_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 30720, 65536)
STEP_MEMORY_WORKLOADS = {
    "small": [tuple(_tiny(1, n, new_tokens=16) for n in (32, 64, 128))],
    "real": [tuple(_smollm2(1, n, new_tokens=512) for n in _LENGTHS)],
    "big": [tuple(_smollm2(1, n, new_tokens=512) for n in _LENGTHS)],
}
# For `bench_train_overfit.py`. 64 tokens in 64 slots take about 85 autoencoding steps; in 32 slots, 89 steps brought
# the loss to 1.0.
OVERFIT_WORKLOADS = {
    "small": [OverfitCase("tiny", "fp32", 2, 16, 8, warm_steps=2, max_steps=3, goal=None)],
    "real": [OverfitCase("smollm2-135m", "bf16", 8, 64, 64, warm_steps=40, max_steps=130, goal=0.05)],
    "big": [OverfitCase("smollm2-135m", "bf16", 8, 64, 32, warm_steps=40, max_steps=220, goal=0.05)],
}
# For `bench_encode_attention.py`, with SmolLM2's heads.
ATTENTION_WORKLOADS = {
    "small": [Rows(2, 24), Rows(3, 7)],
    "real": [Rows(4, 640), Rows(8, 640), Rows(1, 8192 + 128), Rows(64, 128 + 128)],
    "big": [Rows(4, 640), Rows(8, 640), Rows(1, 8192 + 128), Rows(64, 128 + 128)],
}


def qkv_flops(shape: ModelShape, tokens: int, rank: int, queries: int | None = None) -> int:
    """Return the multiplications and additions of one layer's QKV and LoRA products.

    Args:
        shape: the model.
        tokens: rows of the packed batch.
        rank: LoRA rank.
        queries: rows that need a query, by default all.
    """
    d, q, kv = shape.hidden_size, shape.q_heads * shape.head_dim, shape.kv_heads * shape.head_dim
    queries = tokens if queries is None else queries
    return 2 * (tokens * (2 * d * kv + rank * (d + kv)) + queries * (d * q + rank * (d + q)))


def attention_flops(shape: ModelShape, rows: list[tuple[int, int]]) -> int:
    """Return the operations of causal attention over rows of (queries, keys), aligned bottom right."""
    pairs = sum(q * k - q * (q - 1) // 2 for q, k in rows)
    return 4 * pairs * shape.q_heads * shape.head_dim


def encode_flops(shape: ModelShape, span_lengths: list[int], memory_size: int, rank: int) -> int:
    """Return the fewest operations for exact slots: no head, and only keys and values for the last layer's context."""
    full = attention_flops(shape, [(n + memory_size,) * 2 for n in span_lengths])
    last = attention_flops(shape, [(memory_size, n + memory_size) for n in span_lengths])
    return encode_gemm_flops(shape, span_lengths, memory_size, rank) + (shape.layers - 1) * full + last


def encode_gemm_flops(shape: ModelShape, span_lengths: list[int], memory_size: int, rank: int) -> int:
    """Return the operations of the products with weights: `encode_flops` without attention."""
    tokens = sum(span_lengths) + memory_size * len(span_lengths)
    slots = memory_size * len(span_lengths)
    d, q = shape.hidden_size, shape.q_heads * shape.head_dim
    rest = 2 * (q * d + 3 * d * shape.mlp)  # output projection and MLP, per token
    full = qkv_flops(shape, tokens, rank) + tokens * rest
    return (shape.layers - 1) * full + qkv_flops(shape, tokens, rank, slots) + slots * rest


def lora_flops_share(shape: ModelShape, span_lengths: list[int], memory_size: int, rank: int) -> float:
    """Return the operations that the LoRA adds, as a fraction of the products with weights without it."""
    sizes = (shape, span_lengths, memory_size)
    without = encode_gemm_flops(*sizes, rank=0)
    return encode_gemm_flops(*sizes, rank) / without - 1
