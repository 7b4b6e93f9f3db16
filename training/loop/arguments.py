"""The section `train`: fields of transformers' `TrainingArguments`, the optimiser SOAP, and three further keys."""

from __future__ import annotations

import dataclasses
import functools
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple, get_type_hints

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from transformers import TrainingArguments

from icae_fast.errors import ConfigError

_STEP = "data.tokens_per_step and data.micro_batch_tokens set the size of a step and of a micro-batch"
_MODEL = "model.dtype is the dtype of the computation"
_MEMORY = "the section memory sets what the backward recomputes"
_STATE = "the position in the data is part of a checkpoint"
_LAUNCH = "the launch sets how processes share work: `accelerate launch --multi_gpu`, or `--use_fsdp --fsdp_version 2`"
# Fields that would have no effect here, or break something, and the reason.
REFUSED = {
    "output_dir": "the top-level key output is the folder",
    "per_device_train_batch_size": _STEP, "per_device_eval_batch_size": _STEP, "gradient_accumulation_steps": _STEP,
    "auto_find_batch_size": _STEP, "train_sampling_strategy": _STEP, "length_column_name": _STEP,
    "dataloader_drop_last": _STEP, "average_tokens_across_devices":
        "a loss is always divided by the labelled tokens of the whole step",
    "num_train_epochs": "a run lasts max_steps, or all stages; epochs are logged",
    "ignore_data_skip": _STATE, "restore_callback_states_from_checkpoint": _STATE, "save_only_model": _STATE,
    "resume_from_checkpoint": "train.resume names the checkpoint",
    "dataloader_num_workers": "data.workers sets whether a second process reads",
    "dataloader_persistent_workers": "data.workers sets whether a second process reads",
    "bf16": _MODEL, "fp16": _MODEL, "bf16_full_eval": _MODEL, "fp16_full_eval": _MODEL,
    "activation_checkpointing": _MEMORY, "activation_checkpointing_kwargs": _MEMORY,
    "gradient_checkpointing": _MEMORY, "gradient_checkpointing_kwargs": _MEMORY,
    "logging_nan_inf_filter": "train.on_nan sets the reaction to a NaN",
    "label_smoothing_factor": "the loss has no such term", "neftune_noise_alpha": "the loss has no such term",
    "use_liger_kernel": "the base model runs on this package's kernels",
    "liger_kernel_config": "the base model runs on this package's kernels",
    "torch_compile": "the base model runs on this package's kernels",
    "torch_compile_backend": "the base model runs on this package's kernels",
    "torch_compile_mode": "the base model runs on this package's kernels",
    "deepspeed": _LAUNCH, "fsdp": _LAUNCH, "fsdp_config": _LAUNCH, "parallelism_config": _LAUNCH,
    "remove_unused_columns": "batches have fixed columns", "label_names": "batches have fixed columns",
    "save_on_each_node": "all processes read and write one output folder",
    "push_to_hub": "upload the finished adapter by `ICAE.push_to_hub`",
}  # fmt: skip


class Default(NamedTuple):
    """A default of this package for a field of `TrainingArguments`.

    Args:
        value: the default.
        text: description of the field, for `docs/settings.md`.
    """

    value: Any
    text: str


DEFAULTS: dict[str, Default] = {
    "logging_steps": Default(10, "interval of log lines."),
    "save_steps": Default(500, "interval of checkpoints."),
    "save_total_limit": Default(3, "checkpoints that are kept; the best one is never deleted."),
    "report_to": Default("none", "where logs are sent besides the output folder, such as tensorboard or wandb."),
    "max_grad_norm": Default(1.0, "norm to which gradients are clipped, as in the paper."),
    "learning_rate": Default(1e-4, "peak learning rate."),
    "lr_scheduler_type": Default("constant_with_warmup", "shape of the learning rate over the run."),
    "weight_decay": Default(0.0, "decoupled weight decay."),
    # Every trained parameter takes part in every step, and the frozen base model has no buffer that changes.
    "ddp_find_unused_parameters": Default(False, "whether DDP searches for parameters without a gradient."),
    "ddp_broadcast_buffers": Default(False, "whether DDP broadcasts buffers."),
}
SOAP = "soap"


class TrainSection(BaseModel):
    """Fields of `TrainingArguments`, and these.

    Args:
        on_nan: reaction to NaN or infinity in a loss or gradient: "stop" ends the run with an error that names the step
            and its samples, "skip" drops the optimiser step, logs and counts it.
        resume: "auto" continues from the newest complete checkpoint in the output folder, if there is one; "never"
            starts anew and requires a folder without checkpoints; any other value is a checkpoint folder.
        token_lr_factor: learning rate of memory tokens, special tokens and the slot gain, as a multiple of
            `learning_rate`. These are as large as embeddings, whereas LoRA's factors are small.
        optim: an optimiser of `TrainingArguments`, or "soap", which trains LoRA's matrices with SOAP and the rest with
            AdamW, with `adam_beta1`, `adam_beta2`, `adam_epsilon` and `weight_decay`.
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    on_nan: Literal["stop", "skip"] = "stop"
    resume: str = "auto"
    token_lr_factor: float = Field(default=1.0, gt=0)
    optim: str = "adamw_torch_fused"

    @model_validator(mode="before")
    @classmethod
    def _check_fields(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        # YAML reads an unquoted `no` as false.
        values = {k: "no" if v is False and k.endswith("_strategy") else v for k, v in values.items()}
        problems = [problem for name, value in values.items() if (problem := cls._problem(name, value))]
        if problems:
            raise ValueError("; ".join(problems))
        if values.get("optim") == SOAP and values.get("optim_args") is not None:
            raise ValueError("train.optim_args has no effect on soap; leave it out")
        return values

    @classmethod
    def _problem(cls, name: str, value: Any) -> str | None:
        if name in REFUSED:
            return f"train.{name} cannot be set: {REFUSED[name]}"
        if name in cls.model_fields:
            return None
        if name not in _types():
            near = get_close_matches(str(name), cls.known(), n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            own = ", ".join(cls.model_fields)
            return f"unknown key train.{name}; {hint}known are {own} and the fields of TrainingArguments"
        try:
            _types()[name].validate_python(value, strict=True)
        except ValidationError as error:
            return f"train.{name} is {value!r}: {error.errors()[0]['msg']}"
        if name == "max_steps" and value < 1:
            return f"train.max_steps is {value}; it must be at least 1, or left out for the steps of all stages"
        return None

    @classmethod
    def known(cls) -> list[str]:
        """Return all keys that the section accepts."""
        return [*cls.model_fields, *(name for name in _types() if name not in REFUSED)]

    def given(self) -> dict[str, Any]:
        """Return the keys that the file sets, and the four of this class."""
        return self.model_dump(mode="json")

    def arguments(self, output: str, max_steps: int, **fixed: Any) -> TrainingArguments:
        """Return `TrainingArguments` of these fields over `DEFAULTS`.

        Args:
            output: output folder.
            max_steps: optimiser steps, unless the section sets them.
            fixed: fields that follow from other sections; they override this one.

        Raises:
            ConfigError: transformers rejects a value.
        """
        defaults = {name: default.value for name, default in DEFAULTS.items()}
        values = {"max_steps": max_steps, **defaults} | dict(self.model_extra or {}) | fixed
        if not torch.accelerator.is_available():
            # Without it, transformers finds no backend for several processes and takes each for the only one.
            values.setdefault("use_cpu", True)
        if self.optim != SOAP:  # the trainer makes SOAP
            values["optim"] = self.optim
        try:
            return TrainingArguments(output_dir=output, ignore_data_skip=True, logging_nan_inf_filter=False, **values)
        except (ValueError, TypeError, ImportError, RuntimeError) as error:
            raise ConfigError(f"transformers rejects the section train: {error}") from error


@functools.cache
def _types() -> dict[str, TypeAdapter]:
    """Return a type checker for each field of `TrainingArguments`."""
    hints = get_type_hints(TrainingArguments)
    config = ConfigDict(arbitrary_types_allowed=True)
    return {f.name: TypeAdapter(hints[f.name], config=config) for f in dataclasses.fields(TrainingArguments) if f.init}
