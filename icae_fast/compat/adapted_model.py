"""The base model with its LoRA as one callable, as the reference's scripts use PEFT's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from icae_fast.backbone.rows import PackedRows, cumulative
from icae_fast.errors import InvalidInputError
from icae_fast.model import icae as modeling


class AdaptedModel(nn.Module):
    """`ICAE.icae`: the base model with its LoRA as one callable, which stands for the reference's `PeftModel`.

    Its parameters are those of the base model and the LoRA factors, shared with the module it was made from.

    Args:
        core: the ICAE.
    """

    def __init__(self, core: modeling.ICAE) -> None:
        super().__init__()
        self.base_model, self.adapter, self.backbone = core.base_model, core.adapter, core.backbone
        self.adapter_enabled = True

    @property
    def config(self) -> Any:
        """The base model's config."""
        return self.base_model.config

    @property
    def device(self) -> torch.device:
        """The base model's device."""
        return self.base_model.device

    @property
    def dtype(self) -> torch.dtype:
        """The base model's dtype."""
        return self.base_model.dtype

    def get_base_model(self) -> nn.Module:
        """The Hugging Face causal language model, without the adapter."""
        return self.base_model

    def get_input_embeddings(self) -> nn.Module:
        """The base model's token embedding."""
        return self.base_model.get_input_embeddings()

    def train(self, mode: bool = True) -> AdaptedModel:
        """Training mode for the LoRA; the base model is frozen and stays in evaluation mode."""
        super().train(mode)
        self.base_model.eval()
        return self

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within this context calls run the plain base model, the decoder."""
        before, self.adapter_enabled = self.adapter_enabled, False
        try:
            yield
        finally:
            self.adapter_enabled = before

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """The decoder's forward under `disable_adapter`, the encoder's otherwise.

        With the adapter off this is the Hugging Face model's own forward, with all its options and its cache.
        With the adapter on, rows are packed and go through this package's ops with LoRA.

        Args:
            input_ids: (B, S), or inputs_embeds: (B, S, d).
            attention_mask: (B, S), 0 at padding.
            position_ids: (B, S) or (1, S); counted from 0 if None.
            past_key_values, use_cache: for the adapter off alone.
            output_hidden_states: with the adapter on, `hidden_states` holds one tensor, the final-normed (B, S, d).
            kwargs: for the base model, with the adapter off alone.

        Returns:
            `logits` (B, S, base vocabulary), with the adapter on 0 at padding as are the hidden states.

        Raises:
            InvalidInputError: a cache or another option with the adapter on, or inputs of other shapes.
        """
        if not self.adapter_enabled:
            return self.base_model(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache,
                output_hidden_states=output_hidden_states, **kwargs,
            )  # fmt: skip
        if past_key_values is not None or use_cache:
            raise InvalidInputError(
                "the encoder keeps no key/value cache: to decode, call it inside `with model.icae.disable_adapter():`; "
                "to compress, use `model._compress` or `icae_fast.ICAE.compress`"
            )
        kwargs.pop("return_dict", None)
        if unknown := [name for name, value in kwargs.items() if value is not None and value is not False]:
            raise InvalidInputError(f"{', '.join(unknown)} cannot be used with the adapter on; leave them out")
        if (input_ids is None) == (inputs_embeds is None):
            raise InvalidInputError("give one of input_ids and inputs_embeds")
        x = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds.to(self.dtype)
        hidden = self._encode(x, attention_mask, position_ids)
        logits = self.base_model.lm_head(hidden)
        return CausalLMOutputWithPast(logits=logits, hidden_states=(hidden,) if output_hidden_states else None)

    def _encode(self, x, attention_mask, position_ids):
        mask = torch.ones(x.shape[:2], dtype=torch.bool) if attention_mask is None else attention_mask.bool().cpu()
        if x.dim() != 3 or mask.shape != x.shape[:2] or not bool(mask.any(1).all()):
            raise InvalidInputError(
                f"embeddings of shape {tuple(x.shape)} and a mask of {tuple(mask.shape)} were given; give (B, S, d) "
                "and (B, S), with a token in every row"
            )
        positions = torch.arange(mask.shape[1])[None] if position_ids is None else position_ids.cpu()
        lengths = mask.sum(1).tolist()
        rows = PackedRows(positions.expand_as(mask)[mask], cumulative(lengths), max(lengths)).to(x.device)
        mask = mask.to(x.device)
        packed = self.backbone.forward(x[mask], rows, self.adapter.pack(x.dtype))
        return torch.zeros_like(x).masked_scatter(mask[..., None], packed)
