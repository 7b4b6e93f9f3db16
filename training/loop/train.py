"""From settings to a trained adapter: the part that pretraining and fine-tuning share."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils import broadcast_object_list, set_seed
from transformers import TrainingArguments

from icae_fast import ICAE
from icae_fast.errors import CheckpointError, ConfigError, ICAEError
from icae_fast.io.hub import load_base_model
from icae_fast.training.data.samples import Draw
from icae_fast.training.data.sources import open_source
from icae_fast.training.data.stream import BatchStream, held_out
from icae_fast.training.loop.arguments import SOAP
from icae_fast.training.loop.checkpoint_folder import find_checkpoint, list_checkpoints, set_aside_newer
from icae_fast.training.loop.interrupt import Interruption, interruptible
from icae_fast.training.loop.model import TrainingModel
from icae_fast.training.loop.settings import SETTINGS_FILE, Settings
from icae_fast.training.loop.settings_file import changed_keys
from icae_fast.training.loop.sharding import check_world, take_over_launch
from icae_fast.training.loop.trainer import ICAETrainer
from icae_fast.training.methods.batch import pack
from icae_fast.training.methods.curriculum import Curriculum
from icae_fast.training.methods.objectives import Sample
from icae_fast.training.methods.slot_code import SlotCode

log = logging.getLogger(__name__)

# With another value of these a checkpoint's adapter would not fit.
_FIXED = ("model.name", "model.revision", "model.adapter", "adapter.")


def load_icae(settings: Settings) -> ICAE:
    """Load the base model, with a new adapter, which depends only on the seed, or the adapter to continue from.

    Raises:
        CheckpointError, UnsupportedModelError, TokenizerMismatchError: a part cannot be loaded.
        ConfigError: the parts do not fit together.
    """
    model, dtype = settings.model, getattr(torch, settings.model.dtype)
    if model.adapter is None:
        base, tokenizer = load_base_model(None, settings.icae_config(), dtype)
        icae = ICAE.from_base(base, settings.icae_config(), tokenizer)
    elif "name" in model.model_fields_set:
        base, tokenizer = load_base_model(None, settings.icae_config(), dtype)
        icae = ICAE.from_pretrained(model.adapter, base_model=base, dtype=dtype, tokenizer=tokenizer)
    else:  # the adapter's config names its base model
        icae = ICAE.from_pretrained(model.adapter, dtype=dtype)
    if model.max_positions is not None:
        icae.max_positions = model.max_positions
    # "auto" depends on timings, and evaluation must round the same way after a resume.
    icae.adapter_mode = "fused"
    return icae


def train(settings: Settings, make_draw: Callable[[ICAE, Settings], Draw]) -> Path:
    """Train as the settings say, from the last checkpoint if there is one.

    Args:
        settings: settings of the run.
        make_draw: makes the object that draws samples from rows.

    Returns:
        The folder of the finished adapter, `output/adapter`.

    Raises:
        ICAEError: any failure, as one error; checkpoints that were already written stay.
        KeyboardInterrupt: Ctrl-C or SIGTERM. An optimiser step in progress was finished and saved; a second signal, at
            least 3 s later, leaves it unsaved.
    """
    with interruptible() as interruption:
        try:
            return _train(settings, make_draw, interruption)
        except KeyboardInterrupt:
            _report_interruption(Path(settings.output))
            raise


def _report_interruption(output: Path) -> None:
    """Log where an interrupted run stands."""
    written = list_checkpoints(output)
    if written:
        log.warning("interrupted: %s has the run so far; start it again to continue", written[-1])
    else:
        log.warning("interrupted before the first checkpoint; the run begins anew when it is started again")


def _train(settings: Settings, make_draw: Callable[[ICAE, Settings], Draw], interruption: Interruption) -> Path:
    """See `train`."""
    output, curriculum = Path(settings.output), settings.curriculum()
    sharded = take_over_launch()
    arguments = settings.training_arguments()
    check_world(arguments.world_size)
    _log_from_one_process(arguments)
    _warn_of_the_end(settings, curriculum)
    found = _resumed(settings, output, arguments)
    _check_unchanged(settings, output, found)
    set_seed(arguments.seed)
    icae = load_icae(settings)
    curriculum.check(icae.config)
    draw = make_draw(icae, settings)
    with arguments.main_process_first(desc="tokenising"):
        source = _open(settings, settings.data.train, icae, draw, curriculum, arguments.seed)
        held_out_samples = _held_out(settings, icae, draw, curriculum, arguments.seed)
    data = settings.data
    stream = BatchStream(
        source, draw, curriculum, tokens_per_step=data.tokens_per_step, micro_batch_tokens=data.micro_batch_tokens,
        rank=arguments.process_index, world_size=arguments.world_size, seed=arguments.seed,
        window_steps=data.window_steps,
    )  # fmt: skip
    arguments.gradient_accumulation_steps = stream.micro_batches_per_step
    code = _slot_code(icae, curriculum, arguments, sharded)
    trainer = ICAETrainer(
        TrainingModel(icae, settings.budget(), settings.distill(), code), arguments, stream,
        eval_batches=[pack(samples) for samples in held_out_samples], on_nan=settings.train.on_nan,
        restore=_passage(settings, held_out_samples), shard_base=sharded,
        token_lr_factor=settings.train.token_lr_factor, soap=settings.train.optim == SOAP,
        interruption=interruption,
    )  # fmt: skip
    if arguments.should_save:
        try:
            settings.save(output)
        except OSError as error:
            raise CheckpointError(f"the output folder {output} cannot be written: {error}") from error
    if found is None or not trainer.load_finished(found):
        with interruption.deferred():
            trainer.train(resume_from_checkpoint=None if found is None else str(found))
    trainer.save_model(str(output / "adapter"))
    return output / "adapter"


def _warn_of_the_end(settings: Settings, curriculum: Curriculum) -> None:
    """Warn if `train.max_steps` ends the run before its last stage."""
    last, stage = curriculum.stage_at(settings.max_steps - 1)
    if last + 1 < len(curriculum.stages):
        log.warning(
            "train.max_steps is %d: the run ends in stage %d (%s), before the last stage, %d%s",
            settings.max_steps, last, ", ".join(stage.objectives), len(curriculum.stages) - 1,
            "" if settings.trains_encoder else "; it trains no encoder, so its adapter compresses nothing",
        )  # fmt: skip


def _resumed(settings: Settings, output: Path, arguments: TrainingArguments) -> Path | None:
    """Return the checkpoint to continue from, or None; the first process chooses it for all."""
    chosen: list[Any] = [None]
    if arguments.process_index == 0:
        try:
            chosen = [find_checkpoint(output, settings.train.resume)]
            if chosen[0] is not None and settings.train.resume == "auto":
                set_aside_newer(output, chosen[0])
        except ICAEError as error:
            chosen = [error]
    broadcast_object_list(chosen)
    if isinstance(chosen[0], ICAEError):
        raise chosen[0]
    return chosen[0]


def _slot_code(icae: ICAE, curriculum: Curriculum, arguments: TrainingArguments, sharded: bool) -> SlotCode | None:
    """Return a slot code if a stage trains one, else None."""
    if not any(stage.is_code for stage in curriculum.stages):
        return None
    if sharded:
        raise ConfigError("a slot code cannot be trained with a sharded base model; launch without FSDP")
    arguments.ddp_find_unused_parameters = True  # a code stage trains no encoder, and other stages no slot code
    return SlotCode.of(icae)


def _log_from_one_process(arguments: TrainingArguments) -> None:
    """Log information in the first process, and errors in the others."""
    logger = logging.getLogger("icae_fast.training")
    logger.setLevel(logging.INFO if arguments.process_index == 0 else logging.ERROR)
    if not logger.hasHandlers():
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)


def _check_unchanged(settings: Settings, output: Path, found: Path | None) -> None:
    """Compare the settings with those that the checkpoint was begun with."""
    path = output / SETTINGS_FILE
    if found is None or not path.is_file():
        return
    try:
        begun = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(begun, dict):
            raise ValueError("it holds no sections")
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path} is damaged ({reason}); delete it to continue without comparing settings"
        ) from error
    changed = changed_keys(begun, settings.to_dict())
    if fixed := [key for key in changed if key.startswith(_FIXED)]:
        raise ConfigError(
            f"{', '.join(fixed)} differ{'s' * (len(fixed) == 1)} from the settings {found} was begun with; choose "
            "another output folder for a new run"
        )
    if changed:
        log.warning("continuing from %s with changed settings: %s", found, ", ".join(changed))


def _open(settings: Settings, specs: Any, icae: ICAE, draw: Draw, curriculum: Curriculum, seed: int) -> Any:
    data = settings.data
    return open_source(
        specs, icae.tokenizer, draw.fields, on_bad_row=data.on_bad_row, cache_folder=data.cache_folder, seed=seed,
        fragment_tokens=max(stage.max_tokens for stage in curriculum.stages),
        special_tokens=icae.special_tokens,
    )  # fmt: skip


def _held_out(settings: Settings, icae: ICAE, draw: Draw, curriculum: Curriculum, seed: int) -> list[list[Sample]]:
    """Return the evaluation samples, drawn as in the last stage."""
    if settings.data.eval is None:
        return []
    source = _open(settings, settings.data.eval, icae, draw, curriculum, seed)
    evaluation = settings.evaluation
    return held_out(source, draw, curriculum.stages[-1], evaluation.samples, settings.data.micro_batch_tokens, seed)


def _passage(settings: Settings, held_out_samples: list[list[Sample]]) -> tuple[list[int], str] | None:
    """Return the beginning of the first held-out context and its provenance, or None."""
    n = settings.evaluation.restore_tokens
    if not n or not held_out_samples:
        return None
    sample = held_out_samples[0][0]
    return sample.input_ids[:n], sample.origin
