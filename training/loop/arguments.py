"""The section `train`: any field of transformers' `TrainingArguments`, one more optimiser, and three of our own."""

from __future__ import annotations

import dataclasses
import functools
from difflib import get_close_matches
from typing import Any, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from transformers import TrainingArguments

from icae_fast.errors import ConfigError

_STEP = "data.tokens_per_step and data.micro_batch_tokens say how much a step and a micro-batch hold"
_MODEL = "model.dtype is what everything is computed in"
_MEMORY = "the section memory says what is computed again"
_STATE = "the data's own position is part of a checkpoint"
_LAUNCH = "the launch says how processes share work: `accelerate launch --multi_gpu`, or `--use_fsdp --fsdp_version 2`"
# Fields that would have no effect here, or break something; why.
REFUSED = {
    "output_dir": "the key output, at the top, is the folder",
    "per_device_train_batch_size": _STEP, "per_device_eval_batch_size": _STEP, "gradient_accumulation_steps": _STEP,
    "auto_find_batch_size": _STEP, "train_sampling_strategy": _STEP, "length_column_name": _STEP,
    "dataloader_drop_last": _STEP, "average_tokens_across_devices": "a loss is always divided by all tokens of a step",
    "num_train_epochs": "a run is as long as max_steps, or the stages together; its epochs are logged",
    "ignore_data_skip": _STATE, "restore_callback_states_from_checkpoint": _STATE, "save_only_model": _STATE,
    "resume_from_checkpoint": "train.resume says where to go on",
    "dataloader_num_workers": "data.workers says whether a second process reads",
    "dataloader_persistent_workers": "data.workers says whether a second process reads",
    "bf16": _MODEL, "fp16": _MODEL, "bf16_full_eval": _MODEL, "fp16_full_eval": _MODEL,
    "activation_checkpointing": _MEMORY, "activation_checkpointing_kwargs": _MEMORY,
    "gradient_checkpointing": _MEMORY, "gradient_checkpointing_kwargs": _MEMORY,
    "logging_nan_inf_filter": "train.on_nan says what a NaN does",
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

# What differs from transformers: nothing is reported anywhere unless asked for, clipping is the paper's, and the best
# checkpoint is never the one that is deleted.
DEFAULTS: dict[str, Any] = {
    "logging_steps": 10,
    "save_steps": 500,
    "save_total_limit": 3,
    "report_to": "none",
    "max_grad_norm": 1.0,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant_with_warmup",
    "weight_decay": 0.0,
    # All trained parameters take part in every step, and the frozen base has no buffer that changes.
    "ddp_find_unused_parameters": False,
    "ddp_broadcast_buffers": False,
}
SOAP = "soap"


class TrainSection(BaseModel):
    """Fields of `TrainingArguments`, and these.

    Args:
        on_nan: what a loss or gradient with NaN or infinity does: "stop" ends the run with an error that names the
            step and its samples, "skip" drops that optimiser step, logs and counts it.
        resume: "auto" goes on from the newest complete checkpoint in the output folder, if there is one; "never"
            starts anew, and then the folder must hold none; else a checkpoint folder.
        token_lr_factor: the learning rate of memory and special tokens and of the slot gain is `learning_rate` times
            this: they are as large as embeddings, where LoRA's factors are small.
        optim: an optimiser of `TrainingArguments`, or "soap": `icae_fast.training.loop.soap.Soap` for LoRA's matrices
        and AdamW for
            the rest, with `adam_beta1`, `adam_beta2`, `adam_epsilon` and `weight_decay`.
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    on_nan: Literal["stop", "skip"] = "stop"
    resume: str = "auto"
    token_lr_factor: float = Field(1.0, gt=0)
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
        return None

    @classmethod
    def known(cls) -> list[str]:
        """All keys that the section takes."""
        return [*cls.model_fields, *(name for name in _types() if name not in REFUSED)]

    def given(self) -> dict[str, Any]:
        """What the file says, and the fields above."""
        return self.model_dump(mode="json")

    def arguments(self, output: str, max_steps: int, **fixed: Any) -> TrainingArguments:
        """`TrainingArguments` of these fields over `DEFAULTS`.

        Args:
            output: the folder.
            max_steps: where the section gives none.
            fixed: what follows from other sections.

        Raises:
            ConfigError: transformers refuses a value.
        """
        values = {"max_steps": max_steps} | DEFAULTS | dict(self.model_extra or {}) | fixed
        if self.optim != SOAP:  # which the trainer makes
            values["optim"] = self.optim
        try:
            return TrainingArguments(output_dir=output, ignore_data_skip=True, logging_nan_inf_filter=False, **values)
        except (ValueError, TypeError, ImportError, RuntimeError) as error:
            raise ConfigError(f"the section train does not hold together: {error}") from error


@functools.cache
def _types() -> dict[str, TypeAdapter]:
    """A check of each field of `TrainingArguments`."""
    hints = get_type_hints(TrainingArguments)
    config = ConfigDict(arbitrary_types_allowed=True)
    return {f.name: TypeAdapter(hints[f.name], config=config) for f in dataclasses.fields(TrainingArguments) if f.init}
