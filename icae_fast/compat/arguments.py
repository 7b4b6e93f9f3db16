"""The reference's command-line arguments, and their conversion to this package's config and dtype."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from icae_fast.config import ICAEConfig
from icae_fast.errors import ConfigError

_LORA_TARGETS = {"q_proj", "v_proj"}
# Fields of a LoRA configuration without effect on the computation here.
_LORA_NEUTRAL = {
    "task_type", "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "runtime_config", "megatron_core", "qalora_group_size",
}  # fmt: skip


@dataclass
class ModelArguments:
    """The reference's model arguments; `model_name_or_path` may also name the bundled `smollm2-135m-instruct`."""

    model_name_or_path: str = field(
        default="mistralai/Mistral-7B-v0.1", metadata={"help": "base model: a folder, a hub id or a bundled name"}
    )
    lora_r: int = field(default=128, metadata={"help": "LoRA rank"})
    lora_dropout: float = field(default=0.05, metadata={"help": "LoRA dropout"})
    train: bool = field(default=True, metadata={"help": "build the model for training, otherwise for inference"})


@dataclass
class DataArguments:
    """The reference's data arguments."""

    data_path: str | None = field(default=None, metadata={"help": "path of the training data"})
    debug_data: bool = field(default=False, metadata={"help": "use a small data set to try out training"})


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """`transformers.TrainingArguments` with the reference's fields.

    `overwrite_output_dir` is read by the reference's `training_utils.py`, but missing from transformers 5. Without an
    accelerator `use_cpu` is set, because transformers otherwise refuses `--bf16` on a CPU.
    """

    cache_dir: str | None = field(default=None)
    optim: str = field(default="adamw_torch")
    model_max_length: int = field(default=28000, metadata={"help": "longest sequence; longer ones are truncated"})
    fixed_mem_size: int = field(default=128, metadata={"help": "memory tokens per span"})
    mean_compression_rate: int = field(default=4, metadata={"help": "context tokens per memory token"})
    min_tokens_for_lm: int = field(default=64, metadata={"help": "minimum length for the continuation objective"})
    leave_tokens_for_lm: int = field(default=8, metadata={"help": "number of first continuation tokens without loss"})
    lm_ratio: float = field(default=0.0, metadata={"help": "fraction of samples that are continuations"})
    add_special_token_for_lm: bool = field(default=False, metadata={"help": "put the LM token before continuations"})
    restore_from: str = field(default="", metadata={"help": "checkpoint from which fine-tuning starts"})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "train afresh even if output_dir is not empty"})

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():
            self.use_cpu = True
        super().__post_init__()


def config_from_arguments(training_args: Any, lora_config: Any) -> ICAEConfig:
    """Convert the reference's arguments to the adapter's config.

    Args:
        training_args: object with `fixed_mem_size` and `mean_compression_rate`.
        lora_config: a `peft.LoraConfig`, or any object with its `r`, `lora_alpha` and `lora_dropout`.

    Raises:
        ConfigError: a size is out of range, or the LoRA differs from the reference's: targets other than `q_proj` and
            `v_proj`, or an option such as DoRA, rsLoRA, trained biases or `modules_to_save`.
    """
    targets = getattr(lora_config, "target_modules", None)
    if targets is not None and (isinstance(targets, str) or set(targets) != _LORA_TARGETS):
        raise ConfigError(
            f"lora_config.target_modules is {targets!r}, but ICAE trains q_proj and v_proj; leave it out or name these "
            "two"
        )
    defaults: dict[str, Any] = {"bias": "none"}
    for f in dataclasses.fields(lora_config) if dataclasses.is_dataclass(lora_config) else ():
        defaults[f.name] = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
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
    """Return the base model's dtype: bf16 with `--bf16`, otherwise fp16 as in the reference.

    On a CPU, fp32 replaces fp16, which is slower there and overflows.
    """
    if training_args.bf16:
        return torch.bfloat16
    on_gpu = torch.cuda.is_available() and not getattr(training_args, "use_cpu", False)
    return torch.float16 if on_gpu else torch.float32
