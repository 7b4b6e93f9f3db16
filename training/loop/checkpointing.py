"""The part of the trainer that writes and reads checkpoints."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from transformers import Trainer, TrainerState

from icae_fast.config import ICAEConfig
from icae_fast.io.checkpoints import write_adapter
from icae_fast.training.data.stream import BatchStream
from icae_fast.training.loop.checkpoint_folder import (
    OPTIMIZER_FILE,
    PROGRESS_FILE,
    SCHEDULER_FILE,
    STATE_FILE,
    atomic_folder,
    keep_newest,
    loading,
    read_adapter,
)
from icae_fast.training.loop.report import LogInterval
from icae_fast.training.methods.slot_code import SlotCode

log = logging.getLogger(__name__)

_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
_LOAD = StateDictOptions(full_state_dict=True, strict=False)


class CheckpointingTrainer(Trainer):
    """A `Trainer` with the checkpoints of `icae_fast.training.loop.checkpoint_folder`, which hold trained tensors only.

    `ICAETrainer` sets the attributes that are annotated here.
    """

    model: nn.Module  # `Trainer` annotates it as optional
    _config: ICAEConfig
    _base: dict[str, Any]  # identity of the base model
    _keys: Mapping[str, str]  # by name of a trained parameter: its key in the adapter's file
    _stream: BatchStream
    _interval: LogInterval
    _code: SlotCode | None

    @property
    def _output(self) -> Path:
        return Path(cast(str, self.args.output_dir))  # `TrainingArguments` sets a default

    @property
    def _unwrapped_optimizer(self) -> torch.optim.Optimizer:
        """The optimiser in Accelerate's wrapper."""
        return cast(AcceleratedOptimizer, self.optimizer).optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter as `ICAE.save_pretrained` does; all processes call it.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        tensors = cast("dict[str, torch.Tensor]", get_model_state_dict(self.model, options=_FULL))
        if self.args.should_save:
            # A head tied to the embeddings is included under its second name, even when frozen.
            named = {self._keys[name]: tensor for name, tensor in tensors.items() if name in self._keys}
            ordered = {key: named[key] for key in self._keys.values()}
            write_adapter(output_dir or self._output, self._config, self._base, ordered)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        output, step = self._output, self.state.global_step
        best = self.state.best_global_step
        if best == step or (best and (output / f"checkpoint-{best}").is_dir()):
            self.state.best_model_checkpoint = str(output / f"checkpoint-{best}")
        is_main = self.args.should_save
        with atomic_folder(output / f"checkpoint-{step}", is_main=is_main, any_process=self._any_process) as folder:
            self.save_model(str(folder), _internal_call=True)
            optimizer = get_optimizer_state_dict(self.model, self._unwrapped_optimizer, options=_FULL)
            self._save_rng_state(str(folder))
            if is_main:
                assert self.lr_scheduler is not None
                torch.save(optimizer, folder / OPTIMIZER_FILE)
                torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_FILE)
                self.state.save_to_json(str(folder / STATE_FILE))
                progress = {"stream": self._stream.state_dict(), "window": self._interval.state_dict()}
                (folder / PROGRESS_FILE).write_text(json.dumps(progress))
                if self._code is not None:
                    self._code.save(folder)
        if is_main:
            keep_newest(output / f"checkpoint-{step}", self.args.save_total_limit, self.state.best_model_checkpoint)

    def _any_process(self, flag: bool) -> bool:
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.args.device), "sum") > 0)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the adapter, the position in the data, and the log interval."""
        folder = Path(resume_from_checkpoint)
        self.load_adapter(folder)
        if self._code is not None:
            self._code.load(folder)
        with loading(folder):
            progress = json.loads((folder / PROGRESS_FILE).read_text())
            self._stream.load_state_dict(progress["stream"])
            self._interval.load_state_dict(progress["window"])

    def load_adapter(self, folder: Path) -> None:
        """Load the adapter of a checkpoint; all processes call it.

        Raises:
            CheckpointError: it has another config, or is damaged.
            BaseModelMismatchError: it was trained on another base model.
        """
        tensors = read_adapter(folder, self._config, self._base, list(self._keys.values()))
        set_model_state_dict(self.model, {name: tensors[key] for name, key in self._keys.items()}, options=_LOAD)

    def load_finished(self, folder: Path) -> bool:
        """Load the adapter that a run ends with, if a checkpoint is at its end; all processes call it.

        Returns:
            False where steps are left to train.

        Raises:
            CheckpointError, BaseModelMismatchError: see `load_adapter`.
        """
        with loading(folder):
            state = TrainerState.load_from_json(str(folder / STATE_FILE))
            if state.global_step < self.args.max_steps:
                return False
        log.info("%s is the end of the run: there is nothing left to train", folder)
        best = self._output / f"checkpoint-{state.best_global_step}"
        is_best = self.args.load_best_model_at_end and state.best_global_step and best.is_dir()
        self.load_adapter(best if is_best else folder)
        return True

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None  # `Trainer` checks it
        self.load_adapter(Path(self.state.best_model_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        assert checkpoint is not None
        assert self.lr_scheduler is not None
        folder = Path(checkpoint)
        with loading(folder):
            state = torch.load(folder / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
            set_optimizer_state_dict(self.model, self._unwrapped_optimizer, state, options=_LOAD)
            # Loading creates a zero state, one step old, for parameters that have not been trained yet.
            for name, parameter in self.model.named_parameters():
                if name not in state["state"]:
                    self._unwrapped_optimizer.state.pop(parameter, None)
            self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_FILE, weights_only=True))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with loading(Path(checkpoint or "")):
            super()._load_rng_state(checkpoint)
