"""The reference's command-line arguments, and what they mean here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from icae_fast.config import ICAEConfig
from icae_fast.errors import ConfigError

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


def base_dtype(training_args: Any) -> torch.dtype:
    """The base model's: as in the reference bf16, or fp16 without `--bf16`.

    In the latter case it is fp32 on a CPU, where fp16 is slower than fp32 and overflows all the same.
    """
    if training_args.bf16:
        return torch.bfloat16
    on_gpu = torch.cuda.is_available() and not getattr(training_args, "use_cpu", False)
    return torch.float16 if on_gpu else torch.float32
