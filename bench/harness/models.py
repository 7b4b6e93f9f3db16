"""The compared models, built from a `Case` with the same weights for every provider."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.harness.gemms import BareGemms
from bench.harness.shapes import MODELS, Case
from icae_fast import ICAE, ICAEConfig
from icae_fast.adapter.mode import AdapterMode
from icae_fast.backbone.rows import micro_batches, token_budget_on
from icae_fast.benchmark.baseline import BaselineICAE
from icae_fast.core.spans import pack_spans
from icae_fast.io.bundled import load_smollm2

SEED = 0


def build_base(name: str, dtype: torch.dtype, device: str = "cpu") -> tuple[Any, Any]:
    """Return (causal language model, tokenizer or None) for a name in `MODELS`; random weights are reproducible."""
    shape = MODELS[name]
    if shape.bundled:
        model, tokenizer = load_smollm2(dtype)
        return model.to(device), tokenizer
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden_size, num_hidden_layers=shape.layers,
        num_attention_heads=shape.q_heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
        intermediate_size=shape.mlp, max_position_embeddings=8192, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng(), torch.device(device):  # on the device itself: drawing 7B takes minutes on a CPU
        torch.manual_seed(SEED)
        return LlamaForCausalLM._from_config(config, dtype=dtype).eval(), None


def build_icae(base: Any, config: ICAEConfig, tokenizer: Any = None) -> ICAE:
    """Return an `ICAE` with random LoRA B factors; a new adapter's are zero, and the LoRA would change nothing."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        icae = ICAE.from_base(base, config, tokenizer).eval()
        with torch.no_grad():
            for _, _, factor, parameter in icae.adapter.named_factors():
                if factor == "B":
                    parameter.normal_(0.0, 0.02)
    return icae


def in_adapter_mode(icae: ICAE, mode: AdapterMode, call: Callable[[], Any]) -> Callable[[], Any]:
    """Return a call that runs with `icae.adapter_mode` set to "auto", "fused" or "merged", and restores the mode."""

    def run() -> Any:
        before = icae.adapter_mode
        icae.adapter_mode = mode
        try:
            return call()
        finally:
            icae.adapter_mode = before

    return run


@torch.no_grad()
def encode_without_lora(icae: ICAE, spans: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return what `icae.compress` would return without an adapter, (len(spans) * k, d), to measure the LoRA's cost.

    The same micro-batches of packed rows run through the same backbone. Slots are not scaled.
    """
    config, slots = icae.config, []
    memory_tokens = icae.memory_token_embed.weight[: config.memory_size].to(icae.dtype)
    for batch in micro_batches([len(s) + config.memory_size for s in spans], token_budget_on(icae.device)):
        chosen = [spans[i] for i in batch]
        lengths = [len(s) for s in chosen]
        pieces = [p for e in icae.embed(torch.cat(chosen)).split(lengths) for p in (e, memory_tokens)]
        slots.append(icae.backbone.forward(torch.cat(pieces), pack_spans(lengths, config).to(icae.device)))
    return torch.cat(slots)


@contextlib.contextmanager
def with_threads(count: int) -> Iterator[None]:
    """Run with `count` torch threads; 0 keeps the current number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class MergedEncoder:
    """The strongest plain Hugging Face encoder: LoRA merged into the weights, no head, spans in one eager batch.

    Its weights cannot decode, so it is a bound for merging and not a way to run ICAE. Memory positions are `append` and
    slots are not scaled.
    """

    def __init__(self, icae: ICAE) -> None:
        self.memory_size, self.scale = icae.config.memory_size, icae.config.lora_scale
        self.memory_tokens = icae.memory_token_embed.weight[: self.memory_size].detach().to(icae.dtype)
        self.model = copy.deepcopy(icae.base_model.model)
        factors = {(i, name, factor): parameter for i, name, factor, parameter in icae.adapter.named_factors()}
        for i, layer in enumerate(self.model.layers):
            for name, linear in (("q", layer.self_attn.q_proj), ("v", layer.self_attn.v_proj)):
                delta = self.scale * (factors[i, name, "B"] @ factors[i, name, "A"])
                linear.weight.data = (linear.weight.float() + delta).to(linear.weight.dtype)

    @torch.no_grad()
    def compress(self, spans: Sequence[torch.Tensor]) -> torch.Tensor:
        """Compress (L,) spans, all of one length, into slots (len(spans) * k, d)."""
        return self.encode(torch.stack(list(spans)).to(self.memory_tokens.device))

    def encode(self, ids: torch.Tensor) -> torch.Tensor:
        """Compress a (B, L) batch of spans."""
        text = self.model.embed_tokens(ids)
        embeddings = torch.cat((text, self.memory_tokens.expand(len(ids), -1, -1)), dim=1)
        hidden = self.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        return hidden[:, -self.memory_size :].flatten(0, 1)


class CompiledEncoder:
    """A `MergedEncoder` under `torch.compile`, one graph per shape without breaks.

    With `freezing`, inductor treats the weights as constants, so oneDNN can lay them out for its kernels at compile
    time. Dynamo reads the global setting while it traces, which is before `options` apply; without `options` it would
    reuse the graph of the other encoder. Both settings require gradients to be off.

    The first call for a shape compiles; `bench/conftest.py` sets the cache folder.

    Args:
        merged: the encoder to compile.
        freezing: whether weights become constants.
    """

    def __init__(self, merged: MergedEncoder, freezing: bool) -> None:
        self.freezing, self.device = freezing, merged.memory_tokens.device
        self._encode = torch.compile(merged.encode, fullgraph=True, dynamic=False, options={"freezing": freezing})

    @torch.no_grad()
    def compress(self, spans: Sequence[torch.Tensor]) -> torch.Tensor:
        """Compress like `MergedEncoder.compress`."""
        with torch._inductor.config.patch(freezing=self.freezing):
            return self._encode(torch.stack(list(spans)).to(self.device))


class Models:
    """Every provider of one model with the same weights; each is built on first use.

    Args:
        name: a name in `MODELS`.
        dtype: dtype of the base model.
        config: config of the adapter.
        device: device of all providers.

    Attributes:
        icae: the `icae_fast.ICAE`.
    """

    def __init__(self, name: str, dtype: torch.dtype, config: ICAEConfig, device: str = "cpu") -> None:
        base, tokenizer = build_base(name, dtype, device)
        self.icae = build_icae(base, config, tokenizer)

    @functools.cached_property
    def baseline(self) -> BaselineICAE:
        """The baseline."""
        return BaselineICAE.from_icae(self.icae)

    @functools.cached_property
    def training_baseline(self) -> BaselineICAE:
        """The baseline with the second copy that the reference trains with."""
        return BaselineICAE.from_icae(self.icae, two_copies=True)

    @functools.cached_property
    def merged(self) -> MergedEncoder:
        """Hugging Face's model with merged weights."""
        return MergedEncoder(self.icae)

    @functools.cached_property
    def compiled(self) -> CompiledEncoder:
        """`merged` under torch.compile."""
        return CompiledEncoder(self.merged, freezing=False)

    @functools.cached_property
    def frozen(self) -> CompiledEncoder:
        """`merged` under torch.compile with constant weights."""
        return CompiledEncoder(self.merged, freezing=True)

    def gemms(self, spans: Sequence[torch.Tensor]) -> BareGemms:
        """Return icae_fast's bare matrix products for these spans."""
        return BareGemms(self.icae, [len(s) for s in spans], token_budget_on(self.icae.device))


@functools.lru_cache(maxsize=1)  # cases of one model run in a row, and two models may not fit into memory
def _models(name: str, dtype: torch.dtype, config: ICAEConfig, device: str) -> Models:
    return Models(name, dtype, config, device)


def models_for(case: Case, device: str = "cpu") -> Models:
    """Return the providers for a case; the most recent ones are cached."""
    config = ICAEConfig(memory_size=case.memory_size, compression_rate=case.rate, lora_rank=case.rank)
    return _models(case.model, case.torch_dtype, config, device)


def documents_for(case: Case) -> list[torch.Tensor]:
    """Return the case's documents: random ids of base tokens, (tokens,) int64 each."""
    generator = torch.Generator().manual_seed(SEED)
    return [torch.randint(case.shape.vocabulary, (case.tokens,), generator=generator) for _ in range(case.documents)]
