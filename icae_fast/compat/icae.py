"""The reference's `ICAE` class over `icae_fast.ICAE`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from icae_fast.compat.adapted_model import AdaptedModel
from icae_fast.compat.arguments import base_dtype, config_from_arguments
from icae_fast.core.spans import count_spans
from icae_fast.errors import CheckpointError, InvalidInputError
from icae_fast.io import checkpoints
from icae_fast.io.hub import load_base_model
from icae_fast.model import icae as modeling
from icae_fast.step.labels import IGNORE, unpad

log = logging.getLogger(__name__)


class ICAE(nn.Module):
    """The reference's `ICAE`, made from its arguments, over one `icae_fast.ICAE`.

    Args:
        model_args: a `ModelArguments`; `train` puts the model into training mode, which is a plain module's flag
            here, and makes `restore_from` be read.
        training_args: a `TrainingArguments`.
        lora_config: a `peft.LoraConfig` on `q_proj` and `v_proj` (PEFT's own choice for these models).

    Attributes:
        core: the `icae_fast.ICAE`, which holds all weights and has the rest of the interface (`compress`,
            `generate`, `restore`, `save_pretrained`).
        icae: `AdaptedModel`, the callable with `disable_adapter()` and `get_base_model()`.
        tokenizer: the base model's.
        vocab_size: V, the base vocabulary and [PAD]; vocab_size_with_mem: V + k; pad_token_id: V - 1; ae_token_id,
            lm_token_id, ft_token_id: the ids from V + k on; bos_id, eos_id: the tokenizer's or the model's, None
            where there is none.
        mem_size: k; mean_compression_rate: context tokens a slot; dim: d, the hidden size.
        model_args, training_args, model_name, loss_fct: as in the reference.

    Raises:
        ConfigError: see `config_from_arguments`.
        CheckpointError: the base model or `restore_from` cannot be loaded, or is incomplete.
        UnsupportedModelError: another architecture than LLaMA, Mistral, Qwen2 or Qwen3.

    Source: getao/icae `code/icae_v2/modeling_icae_multi_span.py`.
    """

    def __init__(self, model_args: Any, training_args: Any, lora_config: Any) -> None:
        super().__init__()
        config = config_from_arguments(training_args, lora_config)
        self.model_args, self.training_args = model_args, training_args
        self.model_name = model_args.model_name_or_path
        base, self.tokenizer = load_base_model(self.model_name, config, base_dtype(training_args))
        self.core = modeling.ICAE.from_base(base, config, self.tokenizer)
        object.__setattr__(self, "icae", AdaptedModel(self.core))  # unregistered, or every weight is listed twice
        vocabulary = self.core.vocabulary
        self.vocab_size, self.pad_token_id = vocabulary.size, vocabulary.pad
        self.vocab_size_with_mem = vocabulary.size + config.memory_size
        self.ae_token_id, self.lm_token_id, self.ft_token_id = vocabulary.ae, vocabulary.lm, vocabulary.ft
        self.mem_size, self.mean_compression_rate = config.memory_size, config.compression_rate
        self.dim = self.core.backbone.hidden_size
        bos = getattr(self.tokenizer, "bos_token_id", None)
        self.bos_id: int | None = base.config.bos_token_id if bos is None else bos
        self.eos_id: int | None = next(iter(self.core.eos_token_ids), None)
        self.loss_fct = nn.CrossEntropyLoss(ignore_index=IGNORE)
        if model_args.train and getattr(training_args, "restore_from", None):
            self.load_state_dict(checkpoints.read_reference_file(training_args.restore_from))
            log.info("loaded %s", training_args.restore_from)
        self.train(bool(model_args.train))

    @property
    def decoder(self) -> nn.Module:
        """The frozen base model, which also encodes: there is one copy."""
        return self.core.base_model

    @property
    def memory_token_embed(self) -> nn.Embedding:
        """Embedding of the k memory tokens and AE, LM, FT, (k + 3, d), trained."""
        return self.core.memory_token_embed

    @property
    def append_sequence(self) -> torch.Tensor:
        """(1, k) int64 ids of the memory tokens, on the model's device."""
        return torch.arange(self.vocab_size, self.vocab_size_with_mem, device=self.core.device)[None]

    def train(self, mode: bool = True) -> ICAE:
        """Training mode for what is trained; the base model stays in evaluation mode."""
        super().train(mode)
        self.icae.train(mode)
        return self

    def compute_num_segments(self, total_length: int) -> int:
        """Spans that a context of `total_length` tokens is cut into: `ceil(L / (k * rate))`.

        Raises:
            InvalidInputError: the length is not positive.
        """
        if total_length <= 0:
            raise InvalidInputError(f"a context of {total_length} tokens cannot be compressed; give at least one")
        return count_spans(total_length, self.core.config)

    def tokens_to_embeddings(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings of base, memory and special ids: (*shape) to (*shape, d) in the model's dtype."""
        return self.core.tokens_to_embeddings(token_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        prompt_answer_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor | None]:
        """Compress the contexts and score the frozen decoder on the labels; any number of rows.

        Args:
            input_ids: (B, L) contexts, right-padded with `pad_token_id`.
            prompt_answer_ids: (B, S), likewise; every memory id stands for the next slot of its row.
            labels: (B, S), -100 where nothing is learned, or None for no loss.

        Returns:
            `{"loss": () mean over all labels of the batch, "logits": (B, S, base vocabulary)}`.

        Raises:
            InvalidInputError: see `icae_fast.ICAE.forward`.
        """
        return self.core(input_ids, prompt_answer_ids, labels)

    def _compress(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Memory slots of contexts, for inference (no graph).

        Args:
            input_ids: (1, L), or (B, L) right-padded with `pad_token_id`.

        Returns:
            (n_slots, d) for one row, as the reference gives, and (B, n_slots, d) for several. They stay in the
            model's dtype and on its device (the reference copies them to fp32 on the CPU, from where its scripts
            cast them back).

        Raises:
            InvalidInputError: rows with different numbers of slots, or see `icae_fast.ICAE.compress`.
        """
        memories = self.core.compress(unpad(input_ids, self.pad_token_id))
        if len(counts := {m.n_slots for m in memories}) > 1:
            raise InvalidInputError(
                f"the rows give different numbers of slots ({sorted(counts)}), which one tensor cannot hold; "
                "compress contexts with the same number of spans together, or use `model.core.compress`, which gives "
                "a list"
            )
        return memories[0].slots if len(memories) == 1 else torch.stack([m.slots for m in memories])

    def state_dict(
        self, *, destination: dict | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, torch.Tensor]:
        """What is trained, under the reference's checkpoint keys; the base model's weights are left out.

        Args:
            destination: dictionary to add to.
            prefix: before every key.
            keep_vars: give the parameters themselves instead of detached tensors.
        """
        destination = {} if destination is None else destination
        for key, parameter in self.core.reference_named_parameters():
            destination[prefix + key] = parameter if keep_vars else parameter.detach()
        return destination

    def load_state_dict(
        self, state_dict: Mapping[str, torch.Tensor], strict: bool = True, assign: bool = False
    ) -> _IncompatibleKeys:
        """Load trained tensors under the reference's keys; all or none.

        Base weights that come along (the reference's trainer saves the whole model) are compared with the base
        model and not loaded.

        Args:
            state_dict: LoRA factors and `memory_token_embed.weight`, all of them, whatever `strict` is.
            strict: refuse keys that are neither these nor the base model's.
            assign: cannot be used here; values are copied.

        Returns:
            `missing_keys`, always empty, and `unexpected_keys`.

        Raises:
            CheckpointError: tensors are missing or misshaped, or unknown with `strict`.
            BaseModelMismatchError: base weights come along and are not this base model's.
            NonFiniteError: a tensor holds NaN or infinity.
        """
        return _IncompatibleKeys([], self._load(state_dict, strict))

    def _load(self, state_dict: Mapping[str, torch.Tensor], strict: bool) -> list[str]:
        what = "the state dict"
        adapter, base = checkpoints.split_reference_tensors(state_dict)
        own = {key for key, _ in self.core.reference_named_parameters()}
        unexpected = [key for key in adapter if key not in own]
        if checkpoints.GAIN_KEY in unexpected:
            raise CheckpointError(
                f"{what} has a {checkpoints.GAIN_KEY}, which the reference's ICAE does not: it was trained with "
                "icae_fast's slot_scale; load its folder with icae_fast.ICAE.from_pretrained"
            )
        sizes, config = checkpoints.infer_sizes(adapter, what), self.core.config
        if sizes != (config.memory_size, config.lora_rank):
            raise CheckpointError(
                f"{what} has {sizes[0]} memory tokens and LoRA rank {sizes[1]}, this model {config.memory_size} and "
                f"{config.lora_rank}; set --fixed_mem_size and the LoraConfig's r to what the checkpoint has"
            )
        checkpoints.check_base_weights(self.core.base_model, base, what)
        chosen = adapter if strict else {key: adapter[key] for key in adapter if key in own}
        checkpoints.load_adapter_tensors(self.core, chosen, what)
        return unexpected

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        """PyTorch's hook for a module that holds this one (such as DDP): the same as `load_state_dict`."""
        given = {k.removeprefix(prefix): state_dict.pop(k) for k in list(state_dict) if k.startswith(prefix)}
        unexpected_keys += [prefix + key for key in self._load(given, strict=False)]
        # The children are visited next and look for their own names: what they hold is already right.
        state_dict.update({f"{prefix}core.{name}": tensor for name, tensor in self.core.state_dict().items()})
