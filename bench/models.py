"""The models under comparison, built from a `Case`: the same weights for every provider."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.baseline import BaselineICAE
from bench.shapes import MODELS, Case
from icae_fast import ICAE, ICAEConfig
from icae_fast.embedded import load_smollm2

SEED = 0


def build_base(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """(causal language model, tokenizer or None) of a shape in `MODELS`; random weights are the same in every run."""
    shape = MODELS[name]
    if shape.embedded:
        return load_smollm2(dtype)
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden_size, num_hidden_layers=shape.layers,
        num_attention_heads=shape.q_heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
        intermediate_size=shape.mlp, max_position_embeddings=8192, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng():
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
        text = self.model.embed_tokens(torch.stack(list(spans)))
        embeddings = torch.cat((text, self.memory_tokens.expand(len(spans), -1, -1)), dim=1)
        hidden = self.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        return hidden[:, -self.memory_size :].flatten(0, 1)


class Models:
    """Every provider of one model with the same weights; each is made when it is first asked for.

    Attributes:
        icae: `icae_fast.ICAE`; baseline: `BaselineICAE`; merged: `MergedEncoder`.
    """

    def __init__(self, name: str, dtype: torch.dtype, config: ICAEConfig) -> None:
        base, tokenizer = build_base(name, dtype)
        self.icae = build_icae(base, config, tokenizer)

    @functools.cached_property
    def baseline(self) -> BaselineICAE:
        """The reference's way."""
        return BaselineICAE.from_icae(self.icae)

    @functools.cached_property
    def merged(self) -> MergedEncoder:
        """Hugging Face with merged weights."""
        return MergedEncoder(self.icae)


@functools.lru_cache(maxsize=1)  # cases of one model follow one another, and two models may not fit into memory
def _models(name: str, dtype: torch.dtype, config: ICAEConfig) -> Models:
    return Models(name, dtype, config)


def models_for(case: Case) -> Models:
    """The providers for a case; the last model asked for is kept."""
    config = ICAEConfig(memory_size=case.memory_size, compression_rate=case.rate, lora_rank=case.rank)
    return _models(case.model, case.torch_dtype, config)


def documents_for(case: Case) -> list[torch.Tensor]:
    """The case's documents: random ids of base tokens, (tokens,) int64 each."""
    generator = torch.Generator().manual_seed(SEED)
    return [torch.randint(case.shape.vocabulary, (case.tokens,), generator=generator) for _ in range(case.documents)]
