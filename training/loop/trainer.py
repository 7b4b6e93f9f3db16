"""Hugging Face's `Trainer` for packed ICAE batches: exact normalisation, bit-identical resume, and correct logs."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from icae_fast import ICAE
from icae_fast.backbone.sharding import is_sharded, whole_model
from icae_fast.errors import NonFiniteError
from icae_fast.io.identity import base_identity
from icae_fast.step.labels import IGNORE
from icae_fast.training.data.stream import BatchStream, MicroBatch
from icae_fast.training.loop.checkpointing import CheckpointingTrainer
from icae_fast.training.loop.interrupt import Interruption
from icae_fast.training.loop.model import TrainingModel
from icae_fast.training.loop.report import SAMPLES_FILE, LogInterval, Scores, append_line, peak_memory, restoration
from icae_fast.training.loop.sharding import check_world, replicate_trained, shard_base_model
from icae_fast.training.methods.batch import Batch, pack
from icae_fast.training.methods.curriculum import WARM
from icae_fast.training.methods.schedule import stage_schedule, two_group_optimizer

log = logging.getLogger(__name__)

_MOST_ORIGINS = 8


def pack_micro_batch(samples: MicroBatch) -> dict[str, Batch]:
    """Return the keyword arguments of `TrainingModel.forward` for a micro-batch."""
    return {"batch": pack(samples, samples.memory_size)}


@dataclass
class _Forward:
    """Results of a micro-batch's forward, kept until its optimiser step is complete."""

    scores: Scores
    origins: Sequence[str]
    tokens: int
    context_tokens: int
    without_teacher: int


class ICAETrainer(CheckpointingTrainer):
    """A trainer of a `TrainingModel` on a `BatchStream`.

    * An optimiser step's loss is the sum of its token losses over all processes, divided by their number.
    * A checkpoint is complete or absent, holds only trained tensors, and resumes bit-identically, also in the middle of
      an epoch or of a log interval.
    * Logs have a loss for each objective, tokens per second, peak memory, and counts of skipped rows.

    Args:
        model: the model to train.
        args: training arguments; `gradient_accumulation_steps` must be the stream's micro-batches per step.
        stream: micro-batches of this process.
        eval_batches: packed held-out batches, the same in all processes, which share the work. Default none.
        on_nan: reaction to NaN in a loss or gradient: "stop" raises `NonFiniteError`, "skip" drops the step.
        restore: (ids, origin) of a passage that each evaluation restores, default None.
        shard_base: whether the base model's weights are sharded; see `icae_fast.training.loop.sharding`.
        token_lr_factor: learning rate of memory tokens, special tokens and the slot gain, relative to the rest.
        soap: train LoRA's matrices by `Soap` and the rest by AdamW, overriding `args.optim`.
        interruption: once requested in any process, the step is finished, a checkpoint is written (unless
            `args.save_strategy` is "no"), and all processes raise `KeyboardInterrupt`. Default none.
        callbacks: additional `TrainerCallback`s.

    Raises:
        ConfigError: the launch started more processes than work together, or a base model cannot be sharded.
    """

    # Losses are already normalised over the whole step.
    loss_is_scaled_for_ga = True
    _icae: ICAE  # evaluating needs the methods

    def __init__(
        self,
        model: TrainingModel,
        args: TrainingArguments,
        stream: BatchStream,
        *,
        eval_batches: Sequence[Batch] = (),
        on_nan: Literal["stop", "skip"] = "stop",
        restore: tuple[Sequence[int], str] | None = None,
        shard_base: bool = False,
        token_lr_factor: float = 1.0,
        soap: bool = False,
        interruption: Interruption | None = None,
        callbacks: list[Any] | None = None,
    ) -> None:
        check_world(args.world_size)
        icae = model.icae
        self._icae, self._config, self._base = icae, icae.config, base_identity(icae.base_model)
        names = {id(p): name for name, p in model.named_parameters()}
        self._keys = {names[id(p)]: key for key, p in icae.reference_named_parameters()}
        self._stream, self._on_nan, self._restore, self._code = stream, on_nan, restore, model.code
        self._token_lr_factor, self._soap = token_lr_factor, soap
        self._interruption, self._stopping = interruption or Interruption(), False
        self._interval = LogInterval()
        self._forwards: list[_Forward] = []
        if shard_base:
            shard_base_model(model)
        super().__init__(
            model=model, args=args, train_dataset=stream, eval_dataset=list(eval_batches) or None, callbacks=callbacks
        )
        self.model_accepts_loss_kwargs = True
        # Processes draw different dropout masks, as one process does for each sample.
        set_seed(args.seed, device_specific=True)

    # Data

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of this process's micro-batches.

        It does not go through Accelerate, which would split the micro-batches over the processes again.
        """
        return self._stream.loader(
            pack_micro_batch,
            num_workers=self.args.dataloader_num_workers,
            # Making an iterator draws a seed. From the global generator, it would change the dropout of a resumed run,
            # which makes one more iterator.
            generator=torch.Generator(),
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Batch]], torch.Tensor]:
        """Return the micro-batches of an optimiser step, and the divisor of its loss.

        The divisor is the number of labelled tokens in the micro-batches of all processes, in a warm start the number
        of slots.
        """
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if self._exclusive == WARM:
            is_memory = self._icae.vocabulary.is_memory
            n_items = sum(int(is_memory(b["batch"].prompt_answer_ids).sum()) for b in batches)
        else:
            n_items = sum(int((b["batch"].labels != IGNORE).sum()) for b in batches)
        return batches, self.accelerator.reduce(torch.tensor(n_items, device=device), "sum")

    @property
    def _exclusive(self) -> str | None:
        """The exclusive objective of this step's stage, "warm" or "code", or None."""
        return self._stream.curriculum.stage_at(self.state.global_step)[1].exclusive

    # Steps

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """See `Trainer.create_optimizer`; tokens and gain have their own group where their rate differs."""
        factors = {self._token_lr_factor, *(s.token_lr_factor or 1 for s in self._stream.curriculum.stages)}
        if self.optimizer is None and (factors != {1} or self._soap):
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, cast(PreTrainedModel, self.model))
            self.optimizer = two_group_optimizer(
                model or self.model, kind, options, self.args.weight_decay, self._token_lr_factor, self._soap
            )
        return super().create_optimizer(model)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """See `Trainer.create_scheduler`; stages with learning rates are scheduled one by one."""
        curriculum = self._stream.curriculum
        if self.lr_scheduler is None and curriculum.has_rates:
            chosen = optimizer or self.optimizer
            assert chosen is not None  # `Trainer` creates the optimiser first
            self.lr_scheduler = stage_schedule(chosen, self.args, curriculum, self._token_lr_factor)
        return super().create_scheduler(num_training_steps, optimizer)

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: DataLoader | None = None) -> nn.Module:
        """See `Trainer._wrap_model`; with Accelerate's wrapping DDP would also synchronise the base model's shards."""
        sharded = is_sharded(model)  # narrowed by type checkers to a class that is no module
        if training and sharded:
            return replicate_trained(model, self.args.device)
        return super()._wrap_model(model, training, dataloader)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, Any]]:
        """See `Trainer.compute_loss`; keeps the results for the log."""
        exclusive = {"exclusive": self._exclusive} if self._exclusive else {}
        loss, outputs = super().compute_loss(model, inputs | exclusive, True, num_items_in_batch)
        batch, without = inputs["batch"], outputs["without_teacher"]
        self._forwards.append(
            _Forward(Scores.of(outputs), batch.origins, batch.n_tokens, len(batch.context_ids), without)
        )
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """See `Trainer.training_step`. Losses that are not finite are handled at the end of the step, not summed."""
        return super().training_step(model, inputs, num_items_in_batch).nan_to_num(0.0, 0.0, 0.0)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        """Return the gradient's norm.

        The `Trainer` calls this once before each optimiser step. A step that is not finite is dropped here.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        step, self._forwards = self._forwards, []
        scores = sum((m.scores for m in step), start=Scores(torch.zeros_like(step[0].scores.values)))
        bad = [m for m in step if not bool(torch.isfinite(m.scores.values).all())]
        sizes = [[any(m is b for b in bad), m.tokens, m.context_tokens, m.without_teacher] for m in step]
        counts = [*map(sum, zip(*sizes, strict=True)), self._interruption.requested]
        mine = torch.cat((scores.values.new_tensor(counts), scores.values.flatten()))
        n_bad, tokens, context_tokens, without, n_stopping, *values = self.accelerator.reduce(mine, "sum").tolist()
        self._stopping = n_stopping > 0
        self._interval.without_teacher += int(without)
        if n_bad == 0 and math.isfinite(norm):
            scores = Scores(torch.tensor(values, dtype=torch.float64).view(-1, 3))
            self._interval.add(scores, int(tokens), int(context_tokens))
            return norm
        self._drop_step(model, bad or step)
        self._interval.see(int(tokens), int(context_tokens))
        return norm

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """See `Trainer._maybe_log_save_evaluate`; an interrupted run also saves here, and ends."""
        if self._stopping and self.args.save_strategy != SaveStrategy.NO:
            self.control.should_save = True
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self._stopping:
            raise KeyboardInterrupt

    def _drop_step(self, model: nn.Module, blamed: Sequence[_Forward]) -> None:
        """Clear the gradients so that the optimiser changes nothing, or stop."""
        origins = list(dict.fromkeys(o for m in blamed for o in m.origins))
        shown = ", ".join(origins[:_MOST_ORIGINS]) + (f" and {len(origins) - _MOST_ORIGINS} more" * (len(origins) > _MOST_ORIGINS))  # noqa: E501  # fmt: skip
        what = f"step {self.state.global_step + 1}: loss or gradient holds NaN or infinity, with the samples {shown}"
        if self._on_nan == "stop":
            raise NonFiniteError(
                f"{what}; the last checkpoint stands: lower the learning rate, leave these samples out, or set "
                "train.on_nan to skip"
            )
        self._interval.skipped_steps += 1
        log.warning("%s; the step is dropped", what)
        model.zero_grad()

    # Logs and evaluation

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """See `Trainer.log`; adds the values of this package and removes transformers' values that would be wrong."""
        if "loss" in logs:
            logs = {k: v for k, v in logs.items() if k != "loss" and math.isfinite(v)} | self._interval.drain()
            logs |= peak_memory(self.args.device)
            logs |= {f"rows/{cause}": n for cause, n in self._stream.counts.items()}
            logs["stage"] = self._stream.curriculum.stage_at(max(self.state.global_step - 1, 0))[0]
        # The Trainer counts samples by a batch size that is not used here.
        logs = {k: v for k, v in logs.items() if not k.endswith("samples_per_second") and k != "total_flos"}
        self.state.epoch = float(self._stream.epoch)
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure losses over held-out batches, and restore a passage from its memory.

        Returns:
            `eval_loss`, `eval_loss_ae` and so on, `eval_restored` and `eval_exact_prefix`.
        """
        batches = cast("Sequence[Batch]", self.eval_dataset if eval_dataset is None else eval_dataset)
        self.model.eval()
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        total = Scores(Scores().values.to(self.args.device))
        for start in range(0, len(batches), world):
            # Sharded weights require the same number of forwards in all processes; repeated batches are not counted.
            index = min(start + rank, len(batches) - 1)
            scores = Scores.of(self.model(batch=batches[index]))
            if index == start + rank:
                total += scores
        total = Scores(self.accelerator.reduce(total.values, "sum").cpu())
        metrics = total.means(f"{metric_key_prefix}_")
        metrics |= self._restored(metric_key_prefix)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """See `Trainer._determine_best_metric`; no model is the best while a slot code is trained, and no encoder."""
        stage = self._stream.curriculum.stage_at(max(self.state.global_step - 1, 0))[1]
        return not stage.is_code and super()._determine_best_metric(metrics, trial)

    def _restored(self, prefix: str) -> dict[str, float]:
        """Return the metrics of the restored passage in all processes; the first one writes the sample."""
        if self._restore is None:
            return {}
        rates = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        with whole_model(self.model):
            if self.is_world_process_zero():
                sample = {"step": self.state.global_step} | restoration(self._icae, *self._restore)
                append_line(self._output / SAMPLES_FILE, sample)
                rates = rates.new_tensor([sample["matched"], sample["exact_prefix"]])
                log.info("restored at step %d: %s", sample["step"], sample["restored"])
        matched, exact = self.accelerator.reduce(rates, "sum").tolist()
        return {f"{prefix}_restored": matched, f"{prefix}_exact_prefix": exact}
