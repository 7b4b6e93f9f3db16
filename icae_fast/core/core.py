"""`ICAECore`: one set of base weights with an adapter, its sizes and its limits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import nn

from icae_fast.adapter.lora import LoRAAdapter
from icae_fast.adapter.mode import AdapterMode, EncoderWeights
from icae_fast.backbone.forks import check_process
from icae_fast.backbone.modes import without_inference_tensors
from icae_fast.backbone.stack import Backbone, check_supported
from icae_fast.checks import is_int
from icae_fast.config import ICAEConfig
from icae_fast.core.inputs import Context, Vocabulary, check_tokenizer, to_ids
from icae_fast.core.memory import Memory, check_memory
from icae_fast.core.pickling import with_own_weights
from icae_fast.core.spans import CutContext
from icae_fast.core.tokens import SpecialTokens
from icae_fast.errors import ConfigError, ContextTooLongError, InvalidInputError
from icae_fast.kv.tree import SlotKVTree

if TYPE_CHECKING:
    from typing_extensions import Self


DEFAULT_DECODE_BUDGET = 4 << 30


class ICAECore(nn.Module):
    """Weights, caches, sizes and limits of an ICAE, without the public methods that use them.

    Encoding, generation and training take this class. `icae_fast.ICAE` extends it with the public methods.

    Args:
        base_model: a supported Hugging Face causal language model; it is frozen.
        config: sizes and conventions of the adapter.
        tokenizer: the base model's tokenizer, or None to work on token ids only.

    Attributes:
        base_model: the frozen causal language model.
        backbone: its layer stack, run over packed rows.
        config: the adapter's `ICAEConfig`.
        tokenizer: the base model's tokenizer, or None.
        vocabulary: ids of base, memory and special tokens.
        max_positions: the most positions that the decoder may use; the base model's limit unless set.
        special_tokens: how texts are read: "text" or "control".
        chat_template_kwargs: variables for the chat template, such as `{"date_string": "1 Jan 2026"}`; empty unless
            set.
        adapter: `LoRAAdapter`, trained.
        memory_token_embed: (k + 3, d) embeddings of the memory tokens, AE, LM and FT, trained.
        slot_gain: () gain of slot scaling, trained; None without slot scaling.
        encoder_weights: the adapter mode and the merged weights.
        slot_kv: prefix tree of the keys and values that the decoder has read.
        decode_budget: bytes for rows that decode together, see there.

    Raises:
        UnsupportedModelError: another architecture, or quantised or wrapped layers.
        TokenizerMismatchError: the tokenizer does not fit the base model's vocabulary.
        ConfigError: a span exceeds the base model's positions, or `sink_token="bos"` without a BOS token.
    """

    base_model: Any  # as a plain `nn.Module`, each of its attributes would have the type Tensor | Module

    @torch.inference_mode(False)  # an ICAE that is made in inference mode can be used and trained outside of it
    def __init__(self, base_model: Any, config: ICAEConfig, tokenizer: Any = None) -> None:
        super().__init__()
        check_supported(base_model)
        check_process(base_model.get_input_embeddings().weight.device)
        without_inference_tensors(base_model)
        embedding = base_model.get_input_embeddings().weight
        if tokenizer is not None:
            check_tokenizer(tokenizer, embedding.shape[0])
        self.base_model = base_model.requires_grad_(False).eval()
        self.backbone = Backbone(base_model)
        self.config = config.replace(base_model=config.base_model or base_model.config._name_or_path or None)
        self.tokenizer = tokenizer
        self.vocabulary = Vocabulary(embedding.shape[0], config)
        self.max_positions: int = base_model.config.max_position_embeddings
        self.chat_template_kwargs: dict[str, Any] = {}
        self._special_tokens: SpecialTokens = "text"
        self._check_config(config)
        b = self.backbone
        trained_dtype = torch.float64 if embedding.dtype == torch.float64 else torch.float32
        self.adapter = LoRAAdapter(
            config, b.n_layers, b.hidden_size, b.num_q_heads * b.head_dim, b.num_kv_heads * b.head_dim, trained_dtype
        ).to(embedding.device)
        self.encoder_weights = EncoderWeights()
        self.slot_kv = SlotKVTree(self.backbone)
        self._decode_budget = DEFAULT_DECODE_BUDGET
        self.memory_token_embed = nn.Embedding(config.memory_size + 3, b.hidden_size, dtype=trained_dtype)
        # Memory tokens start as random words, whose range the first layer knows. The reference draws from N(0, 1),
        # which is seven times wider than SmolLM2's embeddings (standard deviation 0.136).
        rows = torch.randint(embedding.shape[0], (config.memory_size + 3,))
        self.memory_token_embed.weight.data = embedding.detach()[rows].to(trained_dtype).clone()
        self.slot_gain = nn.Parameter(torch.zeros((), dtype=trained_dtype)) if config.slot_scale else None
        self.to(embedding.device)

    def _check_config(self, config: ICAEConfig) -> None:
        if len(self.leading_ids) + config.max_span_tokens + config.memory_size > self.max_positions:
            raise ConfigError(
                f"a span takes {config.max_span_tokens} context and {config.memory_size} memory tokens, but the base "
                f"model has {self.max_positions} positions; lower memory_size or compression_rate"
            )
        if config.sink_token == "bos" and not self.leading_ids:
            raise ConfigError(
                "sink_token is 'bos', but neither the base model nor its tokenizer has a BOS token; use 'none'"
            )

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype: that of the base model."""
        return self.base_model.get_input_embeddings().weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the base model."""
        return self.base_model.get_input_embeddings().weight.device

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a sequence, from the base model or else from the tokenizer."""
        return self._special_ids("eos_token_id")

    @property
    def leading_ids(self) -> tuple[int, ...]:
        """Ids before each span, and before the slots where no chat template stands: BOS or none (`sink_token`)."""
        return self._special_ids("bos_token_id")[:1] if self.config.sink_token == "bos" else ()

    def _special_ids(self, name: str) -> tuple[int, ...]:
        generation = getattr(self.base_model, "generation_config", None)
        for source in (generation, self.base_model.config, self.tokenizer):
            value = getattr(source, name, None)
            if value is not None:
                return tuple(value) if isinstance(value, (list, tuple)) else (int(value),)
        return ()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Move and cast for `to`, `half` and others, keeping trained tensors in fp32 or wider.

        A cast sets the compute dtype. Rounded factors would be another adapter, to which stored memories are foreign.
        """

        def wide(x: torch.Tensor) -> torch.Tensor:
            out = fn(x)
            narrowed = out.dtype != x.dtype and out.is_floating_point() and out.dtype.itemsize < 4
            return x.to(out.device) if narrowed else out

        self.base_model._apply(fn)
        return super()._apply(wide, recurse)

    def __getstate__(self) -> dict[str, Any]:
        # Pickles hold each weight once: the backbone and the tree refer to the base model, and are made anew.
        state = {name: v for name, v in vars(self).items() if name not in ("backbone", "slot_kv")}
        modules = self._modules | {"base_model": with_own_weights(self.base_model)}
        return state | {"_modules": modules, "_kv_budget": self.kv_budget}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        kv_budget = state.pop("_kv_budget")
        super().__setstate__(state)
        self.backbone = Backbone(self.base_model)
        self.slot_kv = SlotKVTree(self.backbone, kv_budget)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = self.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update({name: copy.deepcopy(v, memo) for name, v in vars(self).items()})
        return twin

    def train(self, mode: bool = True) -> Self:
        """Set training mode for the adapter; the frozen base model stays in evaluation mode."""
        super().train(mode)
        self.base_model.eval()
        return self

    def describe_non_finite(self, what: str) -> str:
        """Return a sentence for `NonFiniteError` that names the first weight with NaN or infinity."""
        for name, parameter in self.named_parameters():
            if not torch.isfinite(parameter).all():
                return f"{what} hold NaN or infinity because the weight {name} does; load intact weights"
        return f"{what} hold NaN or infinity although all weights are finite; use bfloat16 or float32 for this model"

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings (T, d) of base tokens (T,)."""
        return self.base_model.get_input_embeddings()(ids.to(self.device))

    def embedding_norm(self) -> torch.Tensor:
        """Return the mean L2 norm of the base model's token embeddings, () fp32."""
        weight = self.base_model.get_input_embeddings().weight.detach()
        return torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).mean()

    def tokens_to_embeddings(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of base, memory and special ids in the compute dtype; [PAD] becomes zeros.

        Args:
            ids: int64 of any shape.

        Returns:
            (*ids.shape, d).
        """
        ids = ids.to(self.device)
        special = ids - self.vocabulary.size
        base = self.base_model.get_input_embeddings()(ids.clamp(0, self.vocabulary.n_base - 1))
        added = self.memory_token_embed(special.clamp_min(0)).to(base.dtype)
        embeddings = torch.where((special >= 0)[..., None], added, base)
        return embeddings.masked_fill((ids == self.vocabulary.pad)[..., None], 0.0)

    def context_ids(self, context: Context, what: str = "the context") -> torch.Tensor:
        """Return the ids that `compress` reads of a text or a row of ids, (L,) int64 on the CPU.

        Args:
            context: as for `compress`.
            what: name of the context in error messages.

        Raises:
            InvalidInputError, ContextTooLongError, TokenizerMismatchError: as `compress`.
        """
        return self.cut_context(context, what).ids

    def cut_context(self, context: Context, what: str = "the context", *, special_tokens: bool = True) -> CutContext:
        """Tokenise and check a context once, and cut it into spans.

        Args:
            context: as for `compress`.
            what: name of the context in error messages.
            special_tokens: let the tokenizer add its special tokens (BOS); off for a continuation.

        Raises:
            InvalidInputError, ContextTooLongError, TokenizerMismatchError: as `compress`.
        """
        ids = to_ids(
            context, self.tokenizer, what, add_special_tokens=special_tokens, special_tokens=self.special_tokens
        )
        cut = CutContext.of(self.vocabulary.check_context(ids, what), self.config)
        n_slots = len(cut.span_lengths) * self.config.memory_size
        if n_slots >= self.max_positions:
            raise ContextTooLongError(
                f"{what} has {len(ids)} tokens, whose {n_slots} slots do not fit into the base model's "
                f"{self.max_positions} positions; compress it in parts, use a higher compression_rate, or set "
                "icae.max_positions higher if the base model extrapolates"
            )
        return cut

    def check_memory(self, memory: Memory) -> None:
        """Raise unless a memory fits this model; see `icae_fast.core.memory.check_memory`."""
        check_memory(memory, self.config.memory_size, self.backbone.hidden_size)

    @property
    def special_tokens(self) -> SpecialTokens:
        """How the spelling of a control token (`<|im_end|>`, `<s>`) in a text or prompt is read.

        * `"text"`: as the characters that it is. Only the chat template, and the tokenizer's BOS, add control tokens.
        * `"control"`: as the control token, for texts that were prepared with them. Never use it for texts of others.

        Ids given as ids stay as they are.

        Raises:
            InvalidInputError: set to another value.
        """
        return self._special_tokens

    @special_tokens.setter
    def special_tokens(self, value: SpecialTokens) -> None:
        if not isinstance(value, str) or value not in get_args(SpecialTokens):
            raise InvalidInputError(
                f"special_tokens is {value!r}; it must be one of {', '.join(get_args(SpecialTokens))}"
            )
        self._special_tokens = value

    @property
    def adapter_mode(self) -> AdapterMode:
        """How LoRA is applied where nothing is trained (`compress`, `extend`, `encode` under `no_grad`).

        * `"fused"`: on the fly inside `lora_qkv_rope`, with no further weights.
        * `"merged"`: second q, k and v weights W' = W + alpha / r * B A, summed in fp32 and rounded once.
        * `"auto"`: the faster of the two in a timing of one layer's projection at the first call; fused where
          merging saves less than a twentieth of that time or needs more than a quarter of the available memory. The
          choice decides how slots round: set a mode for the same bits on every machine.

        Merged weights take (Hq + 2 Hkv) D d elements a layer, with a copy of k because the op takes one block: in
        bf16 33 MB for SmolLM2-135M, 1.6 GB for Mistral-7B and 3.2 GB for Llama-2-7B. They are not in the state dict.
        Every call compares a fingerprint of the LoRA factors and base weights and merges again if any byte changed.
        They stay until `free_merged_weights`.

        Where W is in bf16, a part of the delta below half a unit in the last place of W is lost, and the rest is
        rounded with W'. SmolLM2's merged bf16 slots are as close to the fp32 slots, and to the baseline's, as fused
        ones, even where most of a small delta is lost: bf16 activations round as coarsely (docs/design.md).

        With gradients or LoRA dropout, LoRA is always fused. The decoder has no adapter.

        Raises:
            InvalidInputError: set to another value.
        """
        return self.encoder_weights.mode

    @adapter_mode.setter
    def adapter_mode(self, mode: AdapterMode) -> None:
        if not isinstance(mode, str) or mode not in get_args(AdapterMode):
            raise InvalidInputError(f"adapter_mode is {mode!r}; it must be one of {', '.join(get_args(AdapterMode))}")
        self.encoder_weights.mode = mode

    @property
    def adapter_mode_in_use(self) -> str | None:
        """Mode of the last call without gradients, `"fused"` or `"merged"`; None before the first."""
        return self.encoder_weights.in_use

    def free_merged_weights(self) -> None:
        """Free the merged weights; the next call that uses them merges again."""
        self.encoder_weights.free()

    def extra_repr(self) -> str:
        """Return the adapter mode, and the mode in use, for `repr`."""
        used = self.adapter_mode_in_use
        return f"adapter_mode={self.adapter_mode!r}" + (f" ({used} in use)" if used else "")

    @property
    def kv_budget(self) -> int:
        """Bytes of slot KV kept for reading memories again; 1 GiB by default, 0 keeps nothing.

        A slot takes 2 * layers * Hkv * D elements: in bf16 23 KB for SmolLM2-135M, 128 KB for Mistral-7B, 512 KB for
        Llama-2-7B.

        Raises:
            InvalidInputError: set to something other than a whole number of at least 0.
        """
        return self.slot_kv.byte_budget

    @kv_budget.setter
    def kv_budget(self, n: int) -> None:
        self.slot_kv.byte_budget = n

    @property
    def decode_budget(self) -> int:
        """Bytes of keys, values and logits of the rows that decode together; 4 GiB by default.

        A call with more rows decodes them group by group, in their order. A row depends on its prompt and its seed; in
        bf16 its rounding also depends on the number of rows beside it. A row that takes more is decoded by itself.

        Raises:
            InvalidInputError: set to something other than a whole number of at least 1.
        """
        return self._decode_budget

    @decode_budget.setter
    def decode_budget(self, n: int) -> None:
        if not is_int(n) or n < 1:
            raise InvalidInputError(f"decode_budget is {n!r}; give a whole number of bytes, at least 1")
        self._decode_budget = int(n)

    def clear_kv(self) -> None:
        """Free all slot KV; needed after a write to base weights through `.data` that the cache cannot detect."""
        self.slot_kv.clear()
