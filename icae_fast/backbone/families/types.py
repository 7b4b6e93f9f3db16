"""Static types of the Hugging Face modules that the views read; transformers has a class of each per family.

They declare attributes for the type checker only. No module is an instance of them, so never test for them.
"""

from __future__ import annotations

from typing import Any

from torch import nn

# A module's children by name. The values are typed `Any`, because only the family knows what each one is.
Children = dict[str, Any]


class RMSNorm(nn.Module):
    """An RMS norm module.

    Attributes:
        weight: factor of each element.
        variance_epsilon: added to the mean square.
    """

    weight: nn.Parameter
    variance_epsilon: float


class Decoder(nn.Module):
    """A language model without its head.

    Attributes:
        rotary_emb: returns cos and sin (1, T, D) for a tensor of their dtype and positions (1, T).
    """

    rotary_emb: nn.Module


class CausalLM(nn.Module):
    """A causal language model.

    Attributes:
        config: the model's configuration.
        model: the model without its head.
        lm_head: the output projection to the vocabulary.
    """

    config: Any
    model: Decoder
    lm_head: nn.Linear

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the token embedding."""
        raise NotImplementedError
