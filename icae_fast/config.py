"""`ICAEConfig`: sizes and conventions of an adapter, i.e. everything except its weights; `Trained`: its training."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal, get_args

from icae_fast.errors import ConfigError

MemoryPositions = Literal["append", "spread"]
SlotScale = Literal["embedding_norm"]
PromptFormat = Literal["chat", "plain", "v1"]
SinkToken = Literal["none", "bos"]


@dataclass(frozen=True)
class ICAEConfig:
    """Sizes and conventions of an ICAE adapter; they are saved with it.

    Args:
        memory_size: k, memory tokens (and memory slots) per span.
        compression_rate: context tokens per slot; a span has at most `memory_size * compression_rate` tokens.
        lora_rank: r of the LoRA on the query and value projections.
        lora_alpha: scales the LoRA product by `lora_alpha / lora_rank`.
        lora_dropout: dropout probability on the LoRA's input in training.
        memory_positions: position ids of the memory tokens. `"append"` (the reference): they continue after the
            context. `"spread"`: memory token i of k takes the last position of its share of a span of L tokens,
            `max(0, floor((i + 1) * L / k) - 1)` (arXiv 2409.14364), which learns far faster.
        slot_scale: None (the reference): slots are the final-normed hidden states. `"embedding_norm"`: each slot is
            scaled to the mean norm of the token embeddings times `exp(gain)`, where gain is a learned scalar.
        prompt_format: tokens around the slots when a prompt is answered. `"chat"` (the reference's v2):
            `template, slots, FT, prompt, template` with the tokenizer's chat template, which is empty if the
            tokenizer has none. `"plain"`: `slots, FT, prompt`. `"v1"`: `slots, FT, prompt, FT`.
        sink_token: token before each span in the encoder, and before the slots in the decoder where no template
            precedes them. `"none"` (the reference) or `"bos"`, the base model's BOS token. A language model turns
            its first position into an attention sink and loses its content (arXiv 2309.17453); without BOS, the
            first token of a text and the first slot of a memory hardly survive.
        base_model: name or path of the base model, from which `from_pretrained` loads it.
        base_revision: revision of the base model on the hub.

    Raises:
        ConfigError: a value is out of range.

    Source: Ge et al., arXiv 2307.06945, section 3.1; getao/icae `code/icae_v2`.
    """

    memory_size: int = 128
    compression_rate: int = 4
    lora_rank: int = 128
    lora_alpha: float = 32.0
    lora_dropout: float = 0.05
    memory_positions: MemoryPositions = "append"
    slot_scale: SlotScale | None = None
    prompt_format: PromptFormat = "chat"
    sink_token: SinkToken = "none"
    base_model: str | None = None
    base_revision: str | None = None

    def __post_init__(self) -> None:
        for name in ("memory_size", "compression_rate", "lora_rank"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1")
        for name, low, high in (("lora_alpha", 0.0, float("inf")), ("lora_dropout", 0.0, 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value < high:
                raise ConfigError(f"{name} is {value!r}; it must be a number from {low} to below {high}")
        if str(self.slot_scale) == "none":  # no value of the type, but accepted
            object.__setattr__(self, "slot_scale", None)
        choices = {"memory_positions": MemoryPositions, "prompt_format": PromptFormat, "sink_token": SinkToken}
        for name, kind in choices.items():
            if getattr(self, name) not in get_args(kind):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(get_args(kind))}")
        if self.slot_scale not in (None, *get_args(SlotScale)):
            raise ConfigError(f"slot_scale is {self.slot_scale!r}; it must be None or 'embedding_norm'")

    @property
    def lora_scale(self) -> float:
        """Factor of the LoRA product, `lora_alpha / lora_rank`."""
        return self.lora_alpha / self.lora_rank

    @property
    def max_span_tokens(self) -> int:
        """Longest span in context tokens, `memory_size * compression_rate`."""
        return self.memory_size * self.compression_rate

    def with_memory_size(self, memory_size: int) -> ICAEConfig:
        """Return the config of an adapter that uses the first `memory_size` memory tokens on the same spans.

        The compression rate becomes `k * rate / memory_size`; see `ICAE.with_memory_size`.

        Args:
            memory_size: slots per span, 1 to k; it must divide `k * rate`.

        Raises:
            ConfigError: the memory size is out of range or does not divide `k * rate`.
        """
        whole = isinstance(memory_size, int) and not isinstance(memory_size, bool)
        if not whole or not 1 <= memory_size <= self.memory_size:
            raise ConfigError(f"memory_size is {memory_size!r}; it must be 1 to {self.memory_size}")
        if self.max_span_tokens % memory_size:
            raise ConfigError(
                f"spans of {self.max_span_tokens} tokens cannot be shared by {memory_size} slots; give a memory_size "
                f"that divides {self.max_span_tokens}"
            )
        return self.replace(memory_size=memory_size, compression_rate=self.max_span_tokens // memory_size)

    def replace(self, **changes: Any) -> ICAEConfig:
        """Return a checked copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ICAEConfig:
        """Return a config with these fields, and defaults for the others.

        Raises:
            ConfigError: a field is unknown or out of range.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(
                f"unknown config field{'s' * (len(unknown) > 1)} {', '.join(unknown)}; the fields are "
                f"{', '.join(sorted(known))}"
            )
        return cls(**values)

    def to_json(self) -> str:
        """Return all fields as indented JSON text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"


@dataclass(frozen=True)
class Trained:
    """The sizes that an adapter was trained with; memories beyond them are read badly, and often as empty.

    Args:
        max_spans: spans of a context, at most.
        span_tokens: context tokens of a span, at most.
        dtype: compute dtype of the base model, such as "bfloat16".

    Raises:
        ConfigError: a value is out of range.
    """

    max_spans: int
    span_tokens: int
    dtype: str

    def __post_init__(self) -> None:
        for name in ("max_spans", "span_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1")
        if not isinstance(self.dtype, str):
            raise ConfigError(f"dtype is {self.dtype!r}; it must be a name such as 'bfloat16'")

    def joined(self, earlier: Trained | None) -> Trained:
        """Return the record of a training that continued from an earlier one."""
        if earlier is None:
            return self
        return Trained(max(self.max_spans, earlier.max_spans), max(self.span_tokens, earlier.span_tokens), self.dtype)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Trained:
        """Return a record with these fields; fields of later versions are left out.

        Raises:
            ConfigError: a field is missing or out of range.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        if missing := [name for name in names if name not in values]:
            raise ConfigError(f"the record of the training lacks {', '.join(missing)}")
        return cls(**{name: values[name] for name in names})
