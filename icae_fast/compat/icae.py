"""The reference's `ICAE` class, implemented with `icae_fast.ICAE`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, TypeVar, overload

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from icae_fast.compat.adapted_model import AdaptedModel
from icae_fast.compat.arguments import base_dtype, config_from_arguments
from icae_fast.core.spans import count_spans
from icae_fast.errors import CheckpointError, InvalidInputError
from icae_fast.io import checkpoints
from icae_fast.io.hub import load_base_model
from icae_fast.io.reference_files import read_reference_file
from icae_fast.model.icae import ICAE as FastICAE  # noqa: N811
from icae_fast.step.labels import IGNORE, unpad

log = logging.getLogger(__name__)

Destination = TypeVar("Destination", bound=dict[str, Any])


class ICAE(nn.Module):
    """The reference's `ICAE`, built from its arguments and backed by one `icae_fast.ICAE`.

    Args:
        model_args: a `ModelArguments`. `train` sets the module's training mode; `restore_from` is loaded only if
            `train` is true.
        training_args: a `TrainingArguments`.
        lora_config: a `peft.LoraConfig` on `q_proj` and `v_proj` (PEFT's default targets for these models).

    Attributes:
        core: the `icae_fast.ICAE`. It holds all weights and has the rest of the interface (`compress`, `generate`,
            `restore`, `save_pretrained`).
        icae: `AdaptedModel`, the callable with `disable_adapter()` and `get_base_model()`.
        tokenizer: the base model's tokenizer.
        vocab_size: V, the size of the base vocabulary plus [PAD].
        vocab_size_with_mem: V + k.
        pad_token_id: V - 1.
        ae_token_id, lm_token_id, ft_token_id: V + k, V + k + 1 and V + k + 2.
        bos_id, eos_id: ids of the tokenizer or the model; None if neither has one.
        mem_size: k, memory tokens per span.
        mean_compression_rate: context tokens per slot.
        dim: d, the hidden size.
        model_args, training_args, model_name, loss_fct: as in the reference.

    Raises:
        ConfigError: see `config_from_arguments`.
        CheckpointError: the base model or `restore_from` cannot be loaded or is incomplete.
        UnsupportedModelError: the architecture of the base model is not supported.

    Source: getao/icae `code/icae_v2/modeling_icae_multi_span.py`.
    """

    icae: AdaptedModel

    def __init__(self, model_args: Any, training_args: Any, lora_config: Any) -> None:
        super().__init__()
        config = config_from_arguments(training_args, lora_config)
        self.model_args, self.training_args = model_args, training_args
        self.model_name = model_args.model_name_or_path
        base, self.tokenizer = load_base_model(self.model_name, config, base_dtype(training_args))
        self.core = FastICAE.from_base(base, config, self.tokenizer)
        object.__setattr__(self, "icae", AdaptedModel(self.core))  # unregistered: `core` already lists every weight
        vocabulary = self.core.vocabulary
        self.vocab_size, self.pad_token_id = vocabulary.size, vocabulary.pad
        self.vocab_size_with_mem = vocabulary.size + config.memory_size
        self.ae_token_id, self.lm_token_id, self.ft_token_id = vocabulary.ae, vocabulary.lm, vocabulary.ft
        self.mem_size, self.mean_compression_rate = config.memory_size, config.compression_rate
        self.dim = self.core.backbone.hidden_size
        bos = getattr(self.tokenizer, "bos_token_id", None)
        self.bos_id: int | None = self.core.base_model.config.bos_token_id if bos is None else bos
        self.eos_id: int | None = self.core.end_id
        self.loss_fct = nn.CrossEntropyLoss(ignore_index=IGNORE)
        if model_args.train and getattr(training_args, "restore_from", None):
            self.load_state_dict(read_reference_file(training_args.restore_from))
            log.info("loaded %s", training_args.restore_from)
        self.train(bool(model_args.train))

    def __getstate__(self) -> dict[str, Any]:
        return {name: v for name, v in vars(self).items() if name != "icae"}  # it refers to the base model again

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        object.__setattr__(self, "icae", AdaptedModel(self.core).train(self.training))

    @property
    def decoder(self) -> nn.Module:
        """Return the frozen base model; the encoder uses the same copy."""
        return self.core.base_model

    @property
    def memory_token_embed(self) -> nn.Embedding:
        """Return the trained embedding of the k memory tokens and AE, LM and FT, (k + 3, d)."""
        return self.core.memory_token_embed

    @property
    def append_sequence(self) -> torch.Tensor:
        """Return the ids of the memory tokens, (1, k) int64 on the model's device."""
        return torch.arange(self.vocab_size, self.vocab_size_with_mem, device=self.core.device)[None]

    def train(self, mode: bool = True) -> ICAE:
        """Set the training mode of the trained parts; the base model stays in evaluation mode."""
        super().train(mode)
        self.icae.train(mode)
        return self

    def compute_num_segments(self, total_length: int) -> int:
        """Return the number of spans of a context: `ceil(L / (k * rate))`.

        Args:
            total_length: L, the context's length in tokens.

        Raises:
            InvalidInputError: the length is not positive.
        """
        if total_length <= 0:
            raise InvalidInputError(f"a context of {total_length} tokens cannot be compressed; pass at least one token")
        return count_spans(total_length, self.core.config)

    def tokens_to_embeddings(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Embed base, memory and special ids: (*shape) to (*shape, d) in the model's dtype."""
        return self.core.tokens_to_embeddings(token_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        prompt_answer_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor | None]:
        """Compress the contexts and compute the frozen decoder's loss on the labels.

        Args:
            input_ids: contexts, (B, L), right-padded with `pad_token_id`.
            prompt_answer_ids: prompts and answers, (B, S), padded likewise. Each memory id is a placeholder for the
                next slot of its row.
            labels: (B, S), -100 at positions without loss; None computes no loss.

        Returns:
            `loss`, the scalar mean over all labels of the batch (None without labels), and `logits` (B, S, base
            vocabulary).

        Raises:
            InvalidInputError: see `icae_fast.ICAE.forward`.
        """
        return self.core(input_ids, prompt_answer_ids, labels)

    def _compress(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Compress contexts to memory slots for inference, without an autograd graph.

        Args:
            input_ids: (1, L), or (B, L) right-padded with `pad_token_id`.

        Returns:
            (n_slots, d) for one row, as in the reference, and (B, n_slots, d) for several. The slots keep the model's
            dtype and device. (The reference copies them to fp32 on the CPU, and its scripts cast them back.)

        Raises:
            InvalidInputError: the rows have different numbers of slots; see also `icae_fast.ICAE.compress`.
        """
        memories = self.core.compress(unpad(input_ids, self.pad_token_id))
        if len(counts := {m.n_slots for m in memories}) > 1:
            raise InvalidInputError(
                f"the rows have different numbers of slots ({sorted(counts)}), which do not fit into one tensor; "
                "compress contexts with equal numbers of spans together, or use `model.core.compress`, which returns "
                "a list"
            )
        return memories[0].slots if len(memories) == 1 else torch.stack([m.slots for m in memories])

    @overload
    def state_dict(self, *, destination: Destination, prefix: str = ..., keep_vars: bool = ...) -> Destination: ...
    @overload
    def state_dict(
        self, *, destination: None = ..., prefix: str = ..., keep_vars: bool = ...
    ) -> dict[str, torch.Tensor]: ...
    def state_dict(
        self, *, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """Return the trained tensors under the reference's checkpoint keys, without the base model's weights.

        Args:
            destination: dictionary to add the tensors to; default: a new one.
            prefix: string put before every key.
            keep_vars: return the parameters themselves instead of detached tensors.
        """
        destination = {} if destination is None else destination
        for key, parameter in self.core.reference_named_parameters():
            destination[prefix + key] = parameter if keep_vars else parameter.detach()
        return destination

    def load_state_dict(
        self, state_dict: Mapping[str, torch.Tensor], strict: bool = True, assign: bool = False
    ) -> _IncompatibleKeys:
        """Load the trained tensors under the reference's keys; load nothing if any check fails.

        The reference's trainer saves the whole model. Base weights in `state_dict` are therefore compared with the
        base model, and never loaded.

        Args:
            state_dict: every LoRA factor and `memory_token_embed.weight`; none may be missing, even without `strict`.
            strict: refuse keys that belong neither to the trained tensors nor to the base model.
            assign: ignored; values are always copied.

        Returns:
            `missing_keys`, always empty, and `unexpected_keys`.

        Raises:
            CheckpointError: a tensor is missing or has a wrong shape, or with `strict` a key is unknown.
            BaseModelMismatchError: `state_dict` holds base weights that differ from this base model's.
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
                f"{what} has a {checkpoints.GAIN_KEY}, which the reference's ICAE lacks, because it was trained with "
                "icae_fast's slot_scale; load its folder with icae_fast.ICAE.from_pretrained"
            )
        sizes, config = checkpoints.infer_sizes(adapter, what), self.core.config
        if sizes != (config.memory_size, config.lora_rank):
            raise CheckpointError(
                f"{what} has {sizes[0]} memory tokens and LoRA rank {sizes[1]}, but this model has "
                f"{config.memory_size} and {config.lora_rank}; set --fixed_mem_size and the LoraConfig's r to the "
                "checkpoint's values"
            )
        checkpoints.check_base_weights(self.core.base_model, base, what)
        chosen = adapter if strict else {key: adapter[key] for key in adapter if key in own}
        checkpoints.load_adapter_tensors(self.core, chosen, what)
        return unexpected

    def _load_from_state_dict(
        self,
        state_dict: dict[str, torch.Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load like `load_state_dict` when a parent module (e.g. DDP) loads its state dict; a PyTorch hook."""
        given = {k.removeprefix(prefix): state_dict.pop(k) for k in list(state_dict) if k.startswith(prefix)}
        unexpected_keys += [prefix + key for key in self._load(given, strict=False)]
        # PyTorch visits the children next and requires their module names; the values are already loaded.
        state_dict.update({f"{prefix}core.{name}": tensor for name, tensor in self.core.state_dict().items()})
