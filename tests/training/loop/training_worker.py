"""A tiny training run as a separate process: `python training_worker.py FOLDER JSON`, also under torchrun."""

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import TrainerCallback, TrainingArguments

from helpers import golden
from icae_fast import ICAE, ICAEConfig
from icae_fast.training.data.stream import MicroBatch
from icae_fast.training.loop.interrupt import Interruption
from icae_fast.training.loop.model import TrainingModel
from icae_fast.training.loop.trainer import ICAETrainer
from icae_fast.training.methods.batch import pack
from icae_fast.training.methods.curriculum import Curriculum, Stage
from icae_fast.training.methods.objectives import Sample, autoencoding_sample, continuation_sample, with_own_tokens


def launch(script, *arguments, processes=1):
    """Run a script of this folder in a new process, or in several under torchrun."""
    several = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"] if processes > 1 else []
    paths = [str(script.parents[n]) for n in (3, 2, 0)]  # the checkout, tests/ and this folder
    return subprocess.run(
        [sys.executable, *several, str(script), *map(str, arguments)],
        env={"PYTHONPATH": ":".join(paths), "OMP_NUM_THREADS": "1", "PATH": "", "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip


def make_icae(**fields) -> ICAE:
    """Return a tiny ICAE on the golden base model, with non-zero B matrices."""
    config = {"memory_size": 2, "compression_rate": 4, "lora_rank": 4, "slot_scale": "embedding_norm"} | fields
    torch.manual_seed(0)
    icae = ICAE.from_base(golden.load_base(), ICAEConfig(**config))
    with torch.no_grad():
        for _, _, factor, parameter in icae.adapter.named_factors():
            if factor == "B":
                parameter.normal_(0.0, 0.1)
    return icae


def make_sample(icae: ICAE, i: int) -> Sample:
    """Return sample i: autoencoding or continuation of up to three spans; from the second step on with own guesses."""
    draw = torch.Generator().manual_seed(i)
    ids = torch.randint(3, icae.vocabulary.n_base, (5 + 7 * (i % 3) + 12,), generator=draw).tolist()
    sample = continuation_sample(icae, ids[:-12], ids[-12:]) if i % 2 else autoencoding_sample(icae, ids[:-12])
    return with_own_tokens(replace(sample, origin=f"rows.jsonl:{i}"), 0.5 if i >= 8 else 0.0, random.Random(i))


class CountingStream(torch.utils.data.IterableDataset):
    """A stand-in for `BatchStream`: micro-batch j of step s holds samples 2 (4 s + j) and 2 (4 s + j) + 1."""

    def __init__(self, icae, rank=0, world_size=1, poisoned=(), micro_batches=4):
        self.icae, self.rank, self.world_size, self.poisoned = icae, rank, world_size, poisoned
        self.total, self.step = micro_batches, 0
        self.micro_batches_per_step = micro_batches // world_size
        self.counts, self.curriculum = {"empty text": 1}, Curriculum([Stage(1, {"ae": 1.0, "lm": 1.0}, 19)])

    def loader(self, make_batch, num_workers, generator):
        return torch.utils.data.DataLoader(self, None, collate_fn=make_batch, generator=generator)

    @property
    def epoch(self):
        return self.step // 4

    def __iter__(self):
        while True:
            for j in range(self.rank, self.total, self.world_size):
                first = 2 * (self.total * self.step + j)
                if j // self.world_size == self.micro_batches_per_step - 1:
                    self.step += 1
                samples = [make_sample(self.icae, first), make_sample(self.icae, first + 1)]
                if first in self.poisoned:
                    samples = [replace(s, origin="NaN") for s in samples]
                yield MicroBatch(samples, self.step, None, {})

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]


class PoisonableModel(TrainingModel):
    """A model whose loss is NaN for samples with the origin "NaN"."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        if "NaN" in kwargs["batch"].origins:
            outputs = {k: v * float("nan") if k in ("loss", "sums") else v for k, v in outputs.items()}
        return outputs


class Watch(TrainerCallback):
    """A callback that saves the gradient of the first step and kills or interrupts the process before a given step."""

    def __init__(self, folder, kill_at, interrupt_at, interruption):
        self.folder, self.kill_at = folder, kill_at
        self.interrupt_at, self.interruption = interrupt_at, interruption

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if state.global_step == self.interrupt_at and args.process_index == args.world_size - 1:
            self.interruption.requested = True

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step > 0:
            return
        full = {n: getattr(p.grad, "full_tensor", lambda g=p.grad: g)() for n, p in model.named_parameters() if p.requires_grad}  # noqa: E501  # fmt: skip
        if args.process_index == 0:
            torch.save({n.removeprefix("module."): g for n, g in full.items()}, Path(self.folder) / "gradient.pt")


def make_trainer(
    folder, *, steps=6, kill_at=None, interrupt_at=None, poisoned=(), on_nan="stop", dropout=0.1, evaluate=False,
    shard_base=False, **arguments,
):  # fmt: skip
    """Return a trainer with four micro-batches per step over all processes."""
    options = dict(max_steps=steps, learning_rate=1e-2, report_to="none", disable_tqdm=True, use_cpu=True, seed=3)  # noqa: C408
    options |= {"save_steps": 2, "logging_steps": 3, "ignore_data_skip": True, "logging_nan_inf_filter": False}
    options |= {"ddp_find_unused_parameters": False, "ddp_broadcast_buffers": False}
    if evaluate:
        options |= {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    arguments = TrainingArguments(str(folder), **(options | arguments))
    icae = make_icae(lora_dropout=dropout)
    stream = CountingStream(icae, arguments.process_index, arguments.world_size, poisoned)
    arguments.gradient_accumulation_steps = stream.micro_batches_per_step
    interruption = Interruption()
    held_out = [pack([make_sample(icae, 1000 + i)]) for i in range(3)]
    evaluation = {"eval_batches": held_out, "restore": (held_out[0].context_ids.tolist(), "held out")}
    return ICAETrainer(
        PoisonableModel(icae), arguments, stream, on_nan=on_nan, shard_base=shard_base,
        interruption=interruption, callbacks=[Watch(folder, kill_at, interrupt_at, interruption)],
        **(evaluation if evaluate else {}),
    )  # fmt: skip


def main(folder: str, options: str) -> None:
    """Train from the last checkpoint, if there is one, and write the log and the adapter's values."""
    from icae_fast.training.loop.checkpoint_folder import find_checkpoint

    torch.set_num_threads(1)
    options = json.loads(options)
    for steps in options.pop("legs", [options.pop("steps", 6)]):  # each continues from the previous one's checkpoint
        trainer = make_trainer(folder, steps=steps, **options)
        found = find_checkpoint(Path(folder), "auto")
        trainer.train(resume_from_checkpoint=str(found) if found else None)
    full = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    tensors = get_model_state_dict(trainer.model, options=full)
    if trainer.is_world_process_zero():
        torch.save(tensors, Path(folder) / "final.pt")
        (Path(folder) / "log.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    main(*sys.argv[1:])
