"""The one table of model shapes and workloads that all benchmarks use, and how much work each of them is."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a LLaMA-like base model.

    Args:
        name: as it stands in results.
        hidden_size, layers, q_heads, kv_heads, head_dim, mlp, vocabulary: its sizes.
        embedded: the real SmolLM2 that comes without a hub; others get random weights.
    """

    name: str
    hidden_size: int
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int
    embedded: bool = False

    @classmethod
    def of(cls, model) -> ModelShape:
        """The shape of a Hugging Face causal language model."""
        c = model.config
        head_dim = model.model.layers[0].self_attn.head_dim
        return cls(
            c._name_or_path or c.model_type, c.hidden_size, c.num_hidden_layers, c.num_attention_heads,
            c.num_key_value_heads, head_dim, c.intermediate_size, c.vocab_size,
        )  # fmt: skip

    def layer_weights(self) -> int:
        """Elements of one layer's matrices."""
        attention = self.hidden_size * self.head_dim * (2 * self.q_heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden_size * self.mlp

    def decode_weights(self) -> int:
        """Elements of all matrices that a decoding step reads: the layers and the head."""
        return self.layers * self.layer_weights() + self.hidden_size * self.vocabulary


MODELS = {
    shape.name: shape
    for shape in (
        ModelShape("tiny", 64, 3, 4, 2, 16, 128, 512),
        ModelShape("smollm2-135m", 576, 30, 9, 3, 64, 1536, 49152, embedded=True),
        ModelShape("llama-1b", 2048, 16, 32, 8, 64, 8192, 32000),
    )
}


@dataclass(frozen=True)
class Case:
    """A model and what it is given to do.

    Args:
        model: a name in `MODELS`; dtype: a name in `DTYPES`.
        documents, tokens: how many documents of how many tokens.
        memory_size, rate, rank: k, context tokens a slot, LoRA rank.
        new_tokens: tokens generated where something is.
    """

    model: str
    dtype: str
    documents: int
    tokens: int
    memory_size: int = 128
    rate: int = 4
    rank: int = 128
    new_tokens: int = 32

    @property
    def name(self) -> str:
        """A readable id, `model-dtype-DOCUMENTSxTOKENS`."""
        return f"{self.model}-{self.dtype}-{self.documents}x{self.tokens}"

    @property
    def shape(self) -> ModelShape:
        """The model's sizes."""
        return MODELS[self.model]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype by which torch knows it."""
        return DTYPES[self.dtype]

    @property
    def span_lengths(self) -> list[int]:
        """Tokens of each span of all documents, by the reference's rule."""
        n = -(-self.tokens // (self.memory_size * self.rate))
        step = -(-self.tokens // n)
        return [min(step, self.tokens - start) for start in range(0, self.tokens, step)] * self.documents


def _tiny(documents: int, tokens: int) -> Case:
    return Case("tiny", "fp32", documents, tokens, memory_size=8, rank=8, new_tokens=4)


# What `--workload` chooses from: each benchmark runs for every case of the list.
WORKLOADS = {
    "small": [_tiny(1, 40), _tiny(2, 64)],
    "real": [Case("smollm2-135m", "bf16", 1, 512), Case("smollm2-135m", "bf16", 4, 512)],
    "big": [
        Case("smollm2-135m", "bf16", 8, 512),
        Case("smollm2-135m", "bf16", 2, 4096),
        Case("llama-1b", "bf16", 1, 512),
        Case("llama-1b", "bf16", 4, 512),
    ],
}


def qkv_flops(shape: ModelShape, tokens: int, rank: int, queries: int | None = None) -> int:
    """Multiplications and additions of one layer's Q, K, V and LoRA products; `queries` tokens get a query."""
    d, q, kv = shape.hidden_size, shape.q_heads * shape.head_dim, shape.kv_heads * shape.head_dim
    queries = tokens if queries is None else queries
    return 2 * (tokens * (2 * d * kv + rank * (d + kv)) + queries * (d * q + rank * (d + q)))


def attention_flops(shape: ModelShape, rows: list[tuple[int, int]]) -> int:
    """Multiplications and additions of causal attention over rows of (queries, keys), bottom-right aligned."""
    pairs = sum(q * k - q * (q - 1) // 2 for q, k in rows)
    return 4 * pairs * shape.q_heads * shape.head_dim


def encode_flops(shape: ModelShape, span_lengths: list[int], memory_size: int, rank: int) -> int:
    """The least work that gives exact slots: in the last layer the context has keys and values only, and no head."""
    tokens = sum(span_lengths) + memory_size * len(span_lengths)
    slots = memory_size * len(span_lengths)
    d, q = shape.hidden_size, shape.q_heads * shape.head_dim
    rest = 2 * (q * d + 3 * d * shape.mlp)  # output projection and MLP, a token
    full = qkv_flops(shape, tokens, rank) + tokens * rest
    full += attention_flops(shape, [(n + memory_size,) * 2 for n in span_lengths])
    last = qkv_flops(shape, tokens, rank, slots) + slots * rest
    last += attention_flops(shape, [(memory_size, n + memory_size) for n in span_lengths])
    return (shape.layers - 1) * full + last
