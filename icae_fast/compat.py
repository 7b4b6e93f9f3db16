"""Drop-in for the reference's own scripts: its `ICAE` and arguments over this package's module.

One line of getao/icae's `pretrain.py`, `instruction_finetune.py`, `pretrained_inference.py` or
`fine_tuned_inference.py` changes, and they (with `training_utils.py` as it is) run on any supported base model:

    from modeling_icae_multi_span import ICAE, ModelArguments, DataArguments, TrainingArguments    # before
    from icae_fast.compat import ICAE, ModelArguments, DataArguments, TrainingArguments            # after

What is different, on purpose:

* One copy of the base model encodes and decodes (`decoder` is the same object), and it keeps its vocabulary: logits
  and `icae.config.vocab_size` have the base's width, so that added tokens never compete.
* Any batch size; rows are padded on the right with `pad_token_id`, and padding is never computed.
* `bos_id` and `eos_id` are the tokenizer's or the model's, not Mistral's 1 and 2.
* `state_dict()` holds the trained tensors alone, and `load_state_dict` refuses a dict that lacks some of them even
  with `strict=False`: the reference goes on with random weights (getao/icae #15).
* What the reference keeps in fp16 when `--bf16` is not given is fp32 on a CPU, where fp16 is slower than fp32 and
  overflows.

A batch of more than one needs the script to pad it: give `train_model` the reference's
`DataCollatorForDynamicPadding(model.pad_token_id)`, as its `pretrain.py` does and `instruction_finetune.py` does not.

Source: getao/icae `code/icae_v2/modeling_icae_multi_span.py`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys
from transformers.modeling_outputs import CausalLMOutputWithPast

from icae_fast import checkpoints
from icae_fast.config import ICAEConfig
from icae_fast.errors import CheckpointError, ConfigError, InvalidInputError
from icae_fast.hub import load_base_model
from icae_fast.loss import IGNORE, unpad
from icae_fast.modeling import ICAE as FastICAE
from icae_fast.spans import PackedRows, count_spans, cumulative

__all__ = ["ICAE", "AdaptedModel", "DataArguments", "ModelArguments", "TrainingArguments", "config_from_arguments"]

log = logging.getLogger(__name__)

_LORA_TARGETS = {"q_proj", "v_proj"}
# Fields of a LoRA configuration that change nothing that is computed here.
_LORA_NEUTRAL = {
    "task_type", "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "runtime_config", "megatron_core", "qalora_group_size",
}  # fmt: skip


@dataclass
class ModelArguments:
    """The reference's model arguments; `model_name_or_path` may also be the embedded `smollm2-135m-instruct`."""

    model_name_or_path: str = field(
        default="mistralai/Mistral-7B-v0.1", metadata={"help": "base model: a folder, a hub id or an embedded name"}
    )
    lora_r: int = field(default=128, metadata={"help": "LoRA rank"})
    lora_dropout: float = field(default=0.05, metadata={"help": "LoRA dropout"})
    train: bool = field(default=True, metadata={"help": "make the model for training; else for inference"})


@dataclass
class DataArguments:
    """The reference's data arguments."""

    data_path: str | None = field(default=None, metadata={"help": "path of the training data"})
    debug_data: bool = field(default=False, metadata={"help": "a small data set, to try the training process"})


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """`transformers.TrainingArguments` with the reference's fields.

    `overwrite_output_dir` is one that transformers 5 dropped and the reference's `training_utils.py` reads. Where
    there is no accelerator, `use_cpu` is set, without which transformers refuses `--bf16` on a CPU.
    """

    cache_dir: str | None = field(default=None)
    optim: str = field(default="adamw_torch")
    model_max_length: int = field(default=28000, metadata={"help": "longest sequence; longer ones are cut"})
    fixed_mem_size: int = field(default=128, metadata={"help": "memory tokens a span"})
    mean_compression_rate: int = field(default=4, metadata={"help": "context tokens a memory token"})
    min_tokens_for_lm: int = field(default=64, metadata={"help": "fewest tokens for the continuation objective"})
    leave_tokens_for_lm: int = field(default=8, metadata={"help": "first tokens of a continuation without loss"})
    lm_ratio: float = field(default=0.0, metadata={"help": "share of continuation samples"})
    add_special_token_for_lm: bool = field(default=False, metadata={"help": "put the LM token before a continuation"})
    restore_from: str = field(default="", metadata={"help": "checkpoint with which fine-tuning begins"})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "train anew although output_dir is not empty"})

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():
            self.use_cpu = True
        super().__post_init__()


def config_from_arguments(training_args: Any, lora_config: Any) -> ICAEConfig:
    """The adapter's config out of the reference's arguments.

    Args:
        training_args: gives `fixed_mem_size` and `mean_compression_rate`.
        lora_config: a `peft.LoraConfig`, or anything with its `r`, `lora_alpha` and `lora_dropout`.

    Raises:
        ConfigError: sizes out of range, or a LoRA that is not the reference's: other targets than `q_proj` and
            `v_proj`, or an option such as DoRA, rsLoRA, trained biases or `modules_to_save`.
    """
    targets = getattr(lora_config, "target_modules", None)
    if targets is not None and (isinstance(targets, str) or set(targets) != _LORA_TARGETS):
        raise ConfigError(
            f"lora_config.target_modules is {targets!r}; ICAE trains q_proj and v_proj: leave it out or name those two"
        )
    defaults: dict[str, Any] = {"bias": "none"}
    for f in dataclasses.fields(lora_config) if dataclasses.is_dataclass(lora_config) else ():
        made = f.default_factory is not dataclasses.MISSING
        defaults[f.name] = f.default_factory() if made else f.default
    read = {"r", "lora_alpha", "lora_dropout", "target_modules"}
    for name, value in vars(lora_config).items():
        known = name in read or name in _LORA_NEUTRAL
        if not known and value != defaults.get(name) and (name in defaults or value):
            raise ConfigError(f"lora_config.{name}={value!r} is not supported; leave it at its default")
    return ICAEConfig(
        memory_size=training_args.fixed_mem_size,
        compression_rate=training_args.mean_compression_rate,
        lora_rank=lora_config.r,
        lora_alpha=lora_config.lora_alpha,
        lora_dropout=lora_config.lora_dropout,
    )


def _base_dtype(training_args: Any) -> torch.dtype:
    """The reference's: bf16, or fp16 without `--bf16`; in the latter case fp32 on a CPU (see the module's text)."""
    if training_args.bf16:
        return torch.bfloat16
    on_gpu = torch.cuda.is_available() and not getattr(training_args, "use_cpu", False)
    return torch.float16 if on_gpu else torch.float32


class AdaptedModel(nn.Module):
    """`ICAE.icae`: the base model with its LoRA as one callable, which stands for the reference's `PeftModel`.

    Its parameters are those of the base model and the LoRA factors, shared with the module it was made from.

    Args:
        core: the ICAE.
    """

    def __init__(self, core: FastICAE) -> None:
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
                "the encoder keeps no key/value cache: call it for decoding within `with model.icae.disable_adapter():`,"
                " and compress contexts with `model._compress` or `icae_fast.ICAE.compress`"
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
        n_rows, length = x.shape[:2]
        mask = torch.ones(n_rows, length, dtype=torch.bool) if attention_mask is None else attention_mask.bool().cpu()
        if x.dim() != 3 or mask.shape != (n_rows, length) or not bool(mask.any(1).all()):
            raise InvalidInputError(
                f"embeddings of shape {tuple(x.shape)} and a mask of {tuple(mask.shape)} were given; give (B, S, d) "
                "and (B, S), with a token in every row"
            )
        positions = torch.arange(length)[None] if position_ids is None else position_ids.cpu()
        lengths = mask.sum(1).tolist()
        rows = PackedRows(positions.expand(n_rows, length)[mask], cumulative(lengths), max(lengths)).to(x.device)
        mask = mask.to(x.device)
        packed = self.backbone.forward(x[mask], rows, self.adapter.pack(x.dtype))
        return torch.zeros_like(x).masked_scatter(mask[..., None], packed)


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
        base, self.tokenizer = load_base_model(self.model_name, config, _base_dtype(training_args))
        self.core = FastICAE.from_base(base, config, self.tokenizer)
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
        self, *args: Any, destination: dict | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, torch.Tensor]:
        """What is trained, under the reference's checkpoint keys; the base model's weights are left out.

        Args:
            args: `destination`, `prefix` and `keep_vars` by position, as old callers of PyTorch pass them.
            destination: dictionary to add to.
            prefix: before every key.
            keep_vars: give the parameters themselves instead of detached tensors.
        """
        given = dict(zip(("destination", "prefix", "keep_vars"), args, strict=False))
        destination, prefix = given.get("destination", destination), given.get("prefix", prefix)
        destination = {} if destination is None else destination
        for key, parameter in self.core.reference_named_parameters():
            destination[prefix + key] = parameter if given.get("keep_vars", keep_vars) else parameter.detach()
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
                f"{what} has a {checkpoints.GAIN_KEY}, which the reference's ICAE does not: it was trained by icae_fast "
                "with slot_scale; load its folder with icae_fast.ICAE.from_pretrained"
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
