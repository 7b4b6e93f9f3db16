"""The models under comparison, built from a `Case`: the same weights for every provider."""

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
from icae_fast.backbone.rows import micro_batches, token_budget_on
from icae_fast.benchmark.baseline import BaselineICAE
from icae_fast.core.spans import pack_spans
from icae_fast.io.bundled import load_smollm2

SEED = 0


def build_base(name: str, dtype: torch.dtype, device: str = "cpu") -> tuple[Any, Any]:
    """(causal language model, tokenizer or None) of a shape in `MODELS`; random weights are the same in every run."""
    shape = MODELS[name]
    if shape.embedded:
        model, tokenizer = load_smollm2(dtype)
        return model.to(device), tokenizer
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden_size, num_hidden_layers=shape.layers,
        num_attention_heads=shape.q_heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
        intermediate_size=shape.mlp, max_position_embeddings=8192, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng(), torch.device(device):  # made where they are to be: 7B take minutes on a CPU
        torch.manual_seed(SEED)
        return LlamaForCausalLM._from_config(config, dtype=dtype).eval(), None


def build_icae(base: Any, config: ICAEConfig, tokenizer: Any = None) -> ICAE:
    """An `ICAE` whose LoRA acts: a new adapter's B is zero, and comparing it would compare nothing."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        icae = ICAE.from_base(base, config, tokenizer).eval()
        with torch.no_grad():
            for _, _, factor, parameter in icae.adapter.named_factors():
                if factor == "B":
                    parameter.normal_(0.0, 0.02)
    return icae


def in_adapter_mode(icae: ICAE, mode: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """A call that runs with `icae.adapter_mode` at "auto", "fused" or "merged", and puts back what it was."""

    def run():
        before = icae.adapter_mode
        icae.adapter_mode = mode
        try:
            return call()
        finally:
            icae.adapter_mode = before

    return run


@torch.no_grad()
def encode_without_lora(icae: ICAE, spans: Sequence[torch.Tensor]) -> torch.Tensor:
    """What `icae.compress` would give if there were no adapter, (len(spans) * k, d): what the LoRA costs is the rest.

    The same micro-batches of the same packed rows go through the same backbone. Slots are not scaled.
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
    """Runs with `count` threads, 0 for as many as there were."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class MergedEncoder:
    """The strongest plain Hugging Face encoder: LoRA merged into the weights, body only, spans in one eager batch.

    It cannot decode with the same weights, so it is a bound on what merging could give, not a way to run ICAE. Memory
    positions are `append` and slots are not scaled.
    """

    def __init__(self, icae: ICAE) -> None:
        self.memory_size, self.scale = icae.config.memory_size, icae.config.lora_scale
        self.memory_tokens = icae.memory_token_embed.weight[: self.memory_size].detach().to(icae.dtype)
        self.model = copy.deepcopy(icae.base_model.model)
        for i, layer in enumerate(icae.adapter.layers):
            attention = self.model.layers[i].self_attn
            for name, linear in (("q", attention.q_proj), ("v", attention.v_proj)):
                delta = self.scale * (layer[f"{name}_B"] @ layer[f"{name}_A"])
                linear.weight.data = (linear.weight.float() + delta).to(linear.weight.dtype)

    @torch.no_grad()
    def compress(self, spans: Sequence[torch.Tensor]) -> torch.Tensor:
        """Slots of (L,) spans, all of one length, (len(spans) * k, d)."""
        return self.encode(torch.stack(list(spans)).to(self.memory_tokens.device))

    def encode(self, ids: torch.Tensor) -> torch.Tensor:
        """Slots of a (B, L) batch of spans."""
        text = self.model.embed_tokens(ids)
        embeddings = torch.cat((text, self.memory_tokens.expand(len(ids), -1, -1)), dim=1)
        hidden = self.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        return hidden[:, -self.memory_size :].flatten(0, 1)


class CompiledEncoder:
    """A `MergedEncoder` under `torch.compile`: one graph for each shape, without a break.

    With `freezing`, inductor takes the weights for constants, which lets oneDNN lay them out for its kernels when
    the graph is compiled. Dynamo looks at the global setting while it traces, so that `options` alone would come too
    late; without them it would take the graph of the other encoder for this one's. Both want gradients to be off.

    The first call for a shape compiles; see `bench/conftest.py` for where that is cached.
    """

    def __init__(self, merged: MergedEncoder, freezing: bool) -> None:
        self.freezing, self.device = freezing, merged.memory_tokens.device
        self._encode = torch.compile(merged.encode, fullgraph=True, dynamic=False, options={"freezing": freezing})

    @torch.no_grad()
    def compress(self, spans: Sequence[torch.Tensor]) -> torch.Tensor:
        """As `MergedEncoder.compress`."""
        with torch._inductor.config.patch(freezing=self.freezing):
            return self._encode(torch.stack(list(spans)).to(self.device))


class Models:
    """Every provider of one model with the same weights; each is made when it is first asked for.

    Attributes:
        icae: `icae_fast.ICAE`; baseline: `BaselineICAE`; training_baseline: the same with the second copy that the
        reference trains with; merged: `MergedEncoder`; compiled, frozen: `CompiledEncoder` without and with freezing.
    """

    def __init__(self, name: str, dtype: torch.dtype, config: ICAEConfig, device: str = "cpu") -> None:
        base, tokenizer = build_base(name, dtype, device)
        self.icae = build_icae(base, config, tokenizer)

    @functools.cached_property
    def baseline(self) -> BaselineICAE:
        """The reference's way."""
        return BaselineICAE.from_icae(self.icae)

    @functools.cached_property
    def training_baseline(self) -> BaselineICAE:
        """The reference's way of training."""
        return BaselineICAE.from_icae(self.icae, two_copies=True)

    @functools.cached_property
    def merged(self) -> MergedEncoder:
        """Hugging Face with merged weights."""
        return MergedEncoder(self.icae)

    @functools.cached_property
    def compiled(self) -> CompiledEncoder:
        """The same under torch.compile."""
        return CompiledEncoder(self.merged, freezing=False)

    @functools.cached_property
    def frozen(self) -> CompiledEncoder:
        """The same under torch.compile with constant weights."""
        return CompiledEncoder(self.merged, freezing=True)

    def gemms(self, spans: Sequence[torch.Tensor]) -> BareGemms:
        """icae_fast's matrix products for these spans, and nothing else."""
        return BareGemms(self.icae, [len(s) for s in spans], token_budget_on(self.icae.device))


@functools.lru_cache(maxsize=1)  # cases of one model follow one another, and two models may not fit into memory
def _models(name: str, dtype: torch.dtype, config: ICAEConfig, device: str) -> Models:
    return Models(name, dtype, config, device)


def models_for(case: Case, device: str = "cpu") -> Models:
    """The providers for a case; the last model asked for is kept."""
    config = ICAEConfig(memory_size=case.memory_size, compression_rate=case.rate, lora_rank=case.rank)
    return _models(case.model, case.torch_dtype, config, device)


def documents_for(case: Case) -> list[torch.Tensor]:
    """The case's documents: random ids of base tokens, (tokens,) int64 each."""
    generator = torch.Generator().manual_seed(SEED)
    return [torch.randint(case.shape.vocabulary, (case.tokens,), generator=generator) for _ in range(case.documents)]
