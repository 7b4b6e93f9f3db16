"""The base model and its LoRA as one callable, with the part of PEFT's interface that the reference's scripts use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from icae_fast.backbone.rows import PackedRows, cumulative
from icae_fast.errors import InvalidInputError
from icae_fast.model.icae import ICAE


class AdaptedModel(nn.Module):
    """The base model and its LoRA as one callable, in the role of the reference's `PeftModel` (`ICAE.icae`).

    Its parameters are those of the base model and the LoRA factors, shared with `core`.

    Args:
        core: the ICAE whose base model and LoRA are called.
    """

    base_model: Any

    def __init__(self, core: ICAE) -> None:
        super().__init__()
        self.base_model, self.adapter, self.backbone = core.base_model, core.adapter, core.backbone
        self.adapter_enabled = True

    @property
    def config(self) -> Any:
        """Return the base model's config."""
        return self.base_model.config

    @property
    def device(self) -> torch.device:
        """Return the base model's device."""
        return self.base_model.device

    @property
    def dtype(self) -> torch.dtype:
        """Return the base model's dtype."""
        return self.base_model.dtype

    def get_base_model(self) -> nn.Module:
        """Return the Hugging Face causal language model, without the adapter."""
        return self.base_model

    def get_input_embeddings(self) -> nn.Module:
        """Return the base model's token embedding."""
        return self.base_model.get_input_embeddings()

    def train(self, mode: bool = True) -> AdaptedModel:
        """Set the LoRA's training mode; the frozen base model stays in evaluation mode."""
        super().train(mode)
        self.base_model.eval()
        return self

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run the base model without LoRA (the decoder) for calls inside this context."""
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
        """Run the decoder under `disable_adapter`, the encoder otherwise.

        With the adapter off, this is the forward of the Hugging Face model, with all its options and its cache.
        With the adapter on, rows are packed and run through this package's ops with LoRA.

        Args:
            input_ids: token ids, (B, S); pass either these or `inputs_embeds`.
            attention_mask: (B, S), 0 at padding; default: no padding.
            position_ids: (B, S) or (1, S); default: 0, 1, 2, ...
            past_key_values: cache of the base model; only with the adapter off.
            inputs_embeds: token embeddings, (B, S, d).
            use_cache: whether to return a cache; only with the adapter off.
            output_hidden_states: with the adapter on, return one tensor in `hidden_states`: the last layer's output
                after the final norm, (B, S, d).
            kwargs: further arguments of the base model; only with the adapter off.

        Returns:
            `logits` (B, S, base vocabulary). With the adapter on, logits and hidden states are 0 at padding.

        Raises:
            InvalidInputError: the adapter is on and a cache or an unsupported option is requested, or an input has a
                wrong shape.
        """
        if not self.adapter_enabled:
            return self.base_model(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache,
                output_hidden_states=output_hidden_states, **kwargs,
            )  # fmt: skip
        if past_key_values is not None or use_cache:
            raise InvalidInputError(
                "the encoder has no key/value cache; to decode, call it inside `with model.icae.disable_adapter():`, "
                "to compress, use `model._compress` or `icae_fast.ICAE.compress`"
            )
        kwargs.pop("return_dict", None)
        if unknown := [name for name, value in kwargs.items() if value is not None and value is not False]:
            raise InvalidInputError(f"not supported with the adapter on: {', '.join(unknown)}; leave these out")
        if (input_ids is None) == (inputs_embeds is None):
            raise InvalidInputError("pass either input_ids or inputs_embeds, and not both")
        x = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds.to(self.dtype)
        hidden = self._encode(x, attention_mask, position_ids)
        logits = self.base_model.lm_head(hidden)
        return CausalLMOutputWithPast(logits=logits, hidden_states=(hidden,) if output_hidden_states else None)

    def _encode(
        self, x: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
    ) -> torch.Tensor:
        mask = torch.ones(x.shape[:2], dtype=torch.bool) if attention_mask is None else attention_mask.bool().cpu()
        if x.dim() != 3 or mask.shape != x.shape[:2] or not bool(mask.any(1).all()):
            raise InvalidInputError(
                f"the embeddings have shape {tuple(x.shape)} and the mask {tuple(mask.shape)}; pass (B, S, d) and "
                "(B, S), with at least one token in every row"
            )
        positions = torch.arange(mask.shape[1])[None] if position_ids is None else position_ids.cpu()
        lengths = mask.sum(1).tolist()
        rows = PackedRows(positions.expand_as(mask)[mask], cumulative(lengths), max(lengths)).to(x.device)
        mask = mask.to(x.device)
        packed = self.backbone.forward(x[mask], rows, self.adapter.pack(x.dtype))
        return torch.zeros_like(x).masked_scatter(mask[..., None], packed)
