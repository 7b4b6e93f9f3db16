"""`ICAE`: the In-context Autoencoder over one set of base weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from icae_fast.adapter.lora import LoRAAdapter
from icae_fast.adapter.mode import AdapterModeMixin, EncoderWeights
from icae_fast.backbone.rows import token_budget_on
from icae_fast.backbone.stack import Backbone, check_supported
from icae_fast.config import ICAEConfig
from icae_fast.core.encoder import encode_spans
from icae_fast.core.inputs import Context, Vocabulary, as_list, check_tokenizer, to_ids
from icae_fast.core.memory import Memory, check_memory
from icae_fast.core.spans import span_lengths
from icae_fast.errors import ConfigError, ContextTooLongError, InvalidInputError, NonFiniteError
from icae_fast.generation.writing import GenerationMixin
from icae_fast.kv.slots import SlotKVMixin
from icae_fast.kv.tree import SlotKVTree
from icae_fast.model.pretrained import PretrainedMixin
from icae_fast.step.budget import ActivationBudget
from icae_fast.step.loss import Teacher, TokenLosses, decoder_forward, token_guesses, token_losses

ACTIVATION_BUDGET = ActivationBudget()


class ICAE(PretrainedMixin, AdapterModeMixin, GenerationMixin, SlotKVMixin, nn.Module):
    """Compresses long contexts into memory slots that the frozen base model reads in their place.

    The encoder is the base model with LoRA on q and v reading `[span, k memory tokens]`; the slots are its
    final hidden states at the memory tokens. The decoder is the same model without the LoRA. There is one
    set of base weights, and it stays usable by itself.

    Make one with `from_base`, `from_pretrained` or `from_reference_checkpoint`.

    Attributes:
        base_model: the Hugging Face causal language model, frozen.
        config: the adapter's `ICAEConfig`.
        tokenizer: the base model's, or None (then everything works on ids).
        adapter: `LoRAAdapter`; memory_token_embed: (k + 3, d) embeddings of memory tokens, AE, LM, FT;
        slot_gain: () or None. These three are what is trained.
        max_positions: the most positions that the decoder may use; the base model's own limit unless set.
        adapter_mode: how compressing applies the LoRA: "auto", "fused" or "merged"; see `AdapterModeMixin`.
        slot_kv: the `SlotKVTree` of keys and values that the decoder has read; see `SlotKVMixin`.

    Source: Ge et al., arXiv 2307.06945; getao/icae `code/icae_v2/modeling_icae_multi_span.py`.
    """

    def __init__(self, base_model: nn.Module, config: ICAEConfig, tokenizer: Any = None) -> None:
        super().__init__()
        check_supported(base_model)
        embedding = base_model.get_input_embeddings().weight
        if tokenizer is not None:
            check_tokenizer(tokenizer, embedding.shape[0])
        self.base_model = base_model.requires_grad_(False).eval()
        self.backbone = Backbone(base_model)
        self.config = config.replace(base_model=config.base_model or base_model.config._name_or_path or None)
        self.tokenizer = tokenizer
        self.vocabulary = Vocabulary(embedding.shape[0], config)
        self.max_positions: int = base_model.config.max_position_embeddings
        if len(self.leading_ids) + config.max_span_tokens + config.memory_size > self.max_positions:
            raise ConfigError(
                f"a span takes {config.max_span_tokens} context and {config.memory_size} memory tokens, but the base "
                f"model has {self.max_positions} positions; lower memory_size or compression_rate"
            )
        if config.sink_token == "bos" and not self.leading_ids:
            raise ConfigError(
                "sink_token is 'bos', but neither the base model nor its tokenizer has a BOS token; use 'none'"
            )
        b = self.backbone
        trained_dtype = torch.float64 if embedding.dtype == torch.float64 else torch.float32
        self.adapter = LoRAAdapter(
            config, b.n_layers, b.hidden_size, b.num_q_heads * b.head_dim, b.num_kv_heads * b.head_dim, trained_dtype
        ).to(embedding.device)
        self.encoder_weights = EncoderWeights()
        self.slot_kv = SlotKVTree(self.backbone)
        self.memory_token_embed = nn.Embedding(config.memory_size + 3, b.hidden_size, dtype=trained_dtype)
        # Memory tokens that begin as words are within the range that the first layer knows; the reference's
        # N(0, 1) is seven times wider than SmolLM2's embeddings (standard deviation 0.136).
        rows = torch.randint(embedding.shape[0], (config.memory_size + 3,))
        self.memory_token_embed.weight.data = embedding.detach()[rows].to(trained_dtype).clone()
        self.slot_gain = nn.Parameter(torch.zeros((), dtype=trained_dtype)) if config.slot_scale else None
        self.to(embedding.device)

    @property
    def dtype(self) -> torch.dtype:
        """The base model's dtype, in which everything is computed."""
        return self.base_model.get_input_embeddings().weight.dtype

    @property
    def device(self) -> torch.device:
        """The base model's device."""
        return self.base_model.get_input_embeddings().weight.device

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a sequence: the base model's, else the tokenizer's."""
        return self._special_ids("eos_token_id")

    @property
    def leading_ids(self) -> tuple[int, ...]:
        """Ids before each span, and before the slots where no template stands: BOS or none, by `config.sink_token`."""
        return self._special_ids("bos_token_id")[:1] if self.config.sink_token == "bos" else ()

    def _special_ids(self, name: str) -> tuple[int, ...]:
        generation = getattr(self.base_model, "generation_config", None)
        for source in (generation, self.base_model.config, self.tokenizer):
            value = getattr(source, name, None)
            if value is not None:
                return tuple(value) if isinstance(value, (list, tuple)) else (int(value),)
        return ()

    def train(self, mode: bool = True) -> ICAE:
        """Training mode for the adapter; the base model is frozen and stays in evaluation mode."""
        super().train(mode)
        self.base_model.eval()
        return self

    def describe_non_finite(self, what: str) -> str:
        """A sentence for `NonFiniteError` that names the first weight with NaN or infinity."""
        for name, parameter in self.named_parameters():
            if not torch.isfinite(parameter).all():
                return f"{what} hold NaN or infinity because the weight {name} does; load intact weights"
        return f"{what} hold NaN or infinity although all weights are finite; use bfloat16 or float32 for this model"

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings of base tokens: (T,) ids to (T, d)."""
        return self.base_model.get_input_embeddings()(ids.to(self.device))

    def embedding_norm(self) -> torch.Tensor:
        """() mean L2 norm of the base model's token embeddings, in fp32."""
        weight = self.base_model.get_input_embeddings().weight.detach()
        return torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).mean()

    def tokens_to_embeddings(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings of any ids, base, memory or special, in the model's dtype; [PAD] gives zeros.

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

    def encode(
        self,
        contexts: Sequence[torch.Tensor],
        token_budget: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        memory_size: int | None = None,
    ) -> list[torch.Tensor]:
        """Slots of each context, with a graph for training.

        All spans of all contexts are packed into micro-batches of at most `token_budget` tokens; nothing is
        padded, no head is run, and in the last layer the context gives keys and values only.

        Args:
            contexts: (L_i,) int64 ids of base tokens.
            token_budget: context and memory tokens of one micro-batch; a longer span goes alone. None for what suits
                the device, see `icae_fast.backbone.rows.token_budget_on`.
            on_progress: called with (context tokens done, of how many) after each micro-batch.
            memory_size: k', to put the first k' memory tokens behind the same spans instead of all k; training with
                many k' makes one adapter that serves them all (`with_memory_size`). With `append` positions these are
                the first k' slots of each span, attention being causal; with `spread` they stand elsewhere.

        Returns:
            (n_spans_i * k, d) for each context, in the model's dtype.

        Raises:
            InvalidInputError: memory_size is not 1 to k.
        """
        return encode_spans(self, contexts, token_budget, on_progress, memory_size=memory_size)

    @torch.no_grad()
    def compress(
        self,
        contexts: Context | Sequence[Context],
        *,
        token_budget: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Memory]:
        """Compress texts or token ids, one or many, of any lengths.

        Each is cut into spans by the reference's rule (`icae_fast.core.spans.span_lengths`), and what comes out
        does not depend on what else is in the list; there is no dropout, in training mode either. Text is
        tokenised as the base model's tokenizer does by itself (with its BOS, if it adds one), as the
        reference's inference scripts do.

        Args:
            contexts: a text, a row of ids, or a list of those.
            token_budget: tokens of one micro-batch, which bounds the working memory; None for what suits the device,
                4096 on the CPU and 32768 on CUDA.
            on_progress: called with (context tokens done, of how many) after each micro-batch.

        Returns:
            A list with one `Memory` for each context, also for a single one.

        Raises:
            InvalidInputError: nothing given, empty text, ids out of range, negative or of memory tokens.
            ContextTooLongError: the slots alone would pass the base model's positions, or memory runs out.
            TokenizerMismatchError: text without a tokenizer.
            NonFiniteError: the slots hold NaN; the weight that is to blame is named.
        """
        token_budget = token_budget_on(self.device, token_budget)
        if token_budget < 1:
            raise InvalidInputError(f"token_budget is {token_budget}; give at least 1")
        rows = [self.context_ids(c, f"context {i}") for i, c in enumerate(as_list(contexts))]
        try:
            slots = encode_spans(self, rows, token_budget, on_progress, dropout=False)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
                raise ContextTooLongError(
                    f"memory ran out while compressing {sum(map(len, rows))} tokens at token_budget={token_budget}; "
                    "lower token_budget or compress fewer documents at once"
                ) from error
            raise
        if not bool(torch.isfinite(torch.cat(slots)).all()):  # waiting for a GPU once
            raise NonFiniteError(self.describe_non_finite("the memory slots"))
        return [Memory(s, len(r), tuple(span_lengths(len(r), self.config))) for s, r in zip(slots, rows, strict=True)]

    def context_ids(self, context: Context, what: str = "the context") -> torch.Tensor:
        """The ids that `compress` reads of a text or row of ids, (L,) int64 on the CPU.

        Args:
            context: as for `compress`.
            what: names it in error messages.

        Raises:
            InvalidInputError, ContextTooLongError, TokenizerMismatchError: see `compress`.
        """
        ids = to_ids(context, self.tokenizer, what, add_special_tokens=True)
        ids = self.vocabulary.check_context(ids, what)
        n_slots = len(span_lengths(len(ids), self.config)) * self.config.memory_size
        if n_slots >= self.max_positions:
            raise ContextTooLongError(
                f"{what} has {len(ids)} tokens, whose {n_slots} slots do not fit into the base model's "
                f"{self.max_positions} positions; compress it in parts, use a higher compression_rate, or set "
                "icae.max_positions higher if the base model extrapolates"
            )
        return ids

    def extend(self, memory: Memory, more: Context, *, token_budget: int | None = None) -> Memory:
        """A memory of the old context followed by `more`; only `more` is encoded.

        `more` is cut into spans by itself. When the old context is made of full spans (k * rate tokens) and so is
        `more`, that is the cut that compressing the whole text would make, and the slots are the same. In all
        other cases the reference's rule would cut the whole text into equal spans and so move every
        boundary; here the old spans stay as they are, the last of them perhaps short, and new ones follow.
        Text is tokenised without special tokens, being a continuation.

        Raises:
            InvalidInputError: `more` is empty, or the memory has another k or hidden size.
            ContextTooLongError: all slots together would pass the base model's positions.
        """
        self._check_memory(memory)
        ids = to_ids(more, self.tokenizer, "the extension", add_special_tokens=False)
        new = self.compress([self.context_ids(ids, "the extension")], token_budget=token_budget)[0]
        if memory.n_slots + new.n_slots >= self.max_positions:
            raise ContextTooLongError(
                f"{memory.n_slots} slots and {new.n_slots} more do not fit into the base model's "
                f"{self.max_positions} positions; keep the extension as a memory of its own"
            )
        return Memory(
            torch.cat((memory.slots.to(new.slots), new.slots)),
            memory.n_source_tokens + new.n_source_tokens,
            memory.span_lengths + new.span_lengths,
        )

    def _check_memory(self, memory: Memory) -> None:
        check_memory(memory, self.config.memory_size, self.backbone.hidden_size)

    def forward(
        self,
        input_ids: torch.Tensor | Sequence[torch.Tensor],
        prompt_answer_ids: torch.Tensor | Sequence[torch.Tensor],
        labels: torch.Tensor | Sequence[torch.Tensor] | None = None,
        token_budget: int | None = None,
    ) -> dict[str, torch.Tensor | None]:
        """The reference's training forward, for any number of rows.

        Contexts are compressed, memory ids in `prompt_answer_ids` are replaced in order by the slots of all
        spans, and the frozen decoder is scored on the labels:

            loss = mean over labels that are not -100 of -log p(label_t | before t),  shifted by one

        Args:
            input_ids: (B, L) contexts, right-padded with the [PAD] id, or a list of (L_i,).
            prompt_answer_ids: (B, S), likewise; memory ids of row i number its spans times k.
            labels: (B, S), -100 where nothing is learned, or None for no loss.
            token_budget: see `encode`.

        Returns:
            `{"loss": () fp32 or None, "logits": (B, S, base vocabulary)}`, zeros in the logits of padding.

        Raises:
            InvalidInputError: shapes or ids that do not fit, or as many memory ids as there are no slots.
        """
        return decoder_forward(self, input_ids, prompt_answer_ids, labels, token_budget)

    def token_losses(
        self,
        contexts: Sequence[torch.Tensor],
        prompts: Sequence[torch.Tensor],
        labels: Sequence[torch.Tensor],
        budget: ActivationBudget = ACTIVATION_BUDGET,
        memory_size: int | None = None,
        teacher: Teacher | None = None,
        slots: Sequence[torch.Tensor] | None = None,
    ) -> TokenLosses:
        """The losses of `forward`, one for each labelled token, at a fraction of its time and memory.

        No logits are kept, the head and the last layer's queries run for labelled positions alone, and what
        `budget` does not allow to keep is computed again for the backward. The mean of the losses is the loss of
        `forward`, with the same gradients.

        Args:
            contexts: (L_i,) int64 ids of base tokens, one for each row.
            prompts: (S_i,) int64, what the decoder reads of row i, with a memory id for each slot.
            labels: (S_i,) int64, -100 where nothing is learned.
            budget: memory for what the backward would otherwise compute again.
            memory_size: slots a span, the first k' of the k; see `encode`.
            teacher: of the labelled tokens, in the order of the losses, for distillation.
            slots: (n_spans_i * k', d) of each context, in place of the encoder's; gradients go to them.

        Raises:
            InvalidInputError: shapes or ids that do not fit, as many memory ids as there are no slots, or a teacher of
                another batch.
            ContextTooLongError: a row is longer than `max_positions`.
        """
        return token_losses(self, contexts, prompts, labels, budget, memory_size, teacher, slots)

    def token_guesses(
        self,
        contexts: Sequence[torch.Tensor],
        prompts: Sequence[torch.Tensor],
        labels: Sequence[torch.Tensor],
        memory_size: int | None = None,
        slots: Sequence[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """What the decoder holds most likely in place of each labelled token, having read the right ones before it.

        Args:
            contexts, prompts, labels, memory_size, slots: as for `token_losses`.

        Returns:
            (n,) int64 ids, in the order of its losses, without a graph.

        Raises:
            InvalidInputError, ContextTooLongError: see `token_losses`.
        """
        return token_guesses(self, contexts, prompts, labels, memory_size, slots)
