"""Pretraining and fine-tuning as a user runs them: from a YAML file and rows of text to an adapter."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from helpers import golden
from icae_fast import ICAE
from icae_fast.errors import CheckpointError, ConfigError
from icae_fast.training import finetune, pretrain
from icae_fast.training.loop import recipes
from icae_fast.training.loop import train as runs
from icae_fast.training.loop.checkpoint_folder import list_checkpoints
from icae_fast.training.loop.settings_file import load_settings
from icae_fast.training.loop.sharding import check_world

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def base(tmp_path, make_tokenizer):
    """The golden base model in a folder, with a tokenizer of words."""
    folder = tmp_path / "base"
    model = golden.load_base()
    model.save_pretrained(folder)
    make_tokenizer(model.config.vocab_size).save_pretrained(folder)
    return folder


@pytest.fixture
def config(tmp_path, base):
    """Return `config(rows, **sections)`, which writes a settings file for the tiny base model and these rows."""

    def make(rows, **sections):
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
        values = {
            "output": str(tmp_path / "out"),
            "model": {"name": str(base), "dtype": "float32"},
            "adapter": {"memory_size": 2, "compression_rate": 4, "lora_rank": 4, "lora_dropout": 0.1},
            "data": {"train": str(data), "tokens_per_step": 200, "micro_batch_tokens": 100, "window_steps": 2,
                     "cache_folder": str(tmp_path / "cache")},
            "stages": [{"steps": 2, "objectives": {"warm": 1}, "max_tokens": 8},
                       {"steps": 4, "objectives": {"ae": 1, "lm": 1}, "max_tokens": 16, "memory_sizes": [1, 2]}],
            "distillation": {"alpha": 0.5, "objectives": ["lm", "ae"]},
            "train": {"save_steps": 2, "logging_steps": 1, "use_cpu": True, "disable_tqdm": True},
        }  # fmt: skip
        for name, section in sections.items():
            values[name] = values.get(name, {}) | section if isinstance(section, dict) else section
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return make


def words(n, seed):
    ids = torch.randint(3, 90, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
    return " ".join(f"w{i}" for i in ids)


TEXTS = [{"text": words(90 + i, i)} for i in range(8)]


def history(tmp_path, step):
    state = json.loads((tmp_path / "out" / f"checkpoint-{step}" / "trainer_state.json").read_text())
    kept = ("grad_norm", "learning_rate", "epoch", "tokens", "step")
    return [{k: v for k, v in line.items() if k in kept or k.startswith("loss")} for line in state["log_history"]]


def test_pretraining_from_texts_with_a_bad_row_in_them(config, tmp_path):
    path = config(
        [*TEXTS, "{broken\n", {"text": ""}], data={"eval": str(tmp_path / "rows.jsonl")},
        train={"eval_steps": 3}, evaluation={"samples": 4, "restore_tokens": 8},
    )  # fmt: skip
    adapter = recipes.pretrain(load_settings(path))
    assert ICAE.from_pretrained(adapter, base_model=golden.load_base(), dtype=torch.float32).config.memory_size == 2
    state = json.loads((tmp_path / "out" / "checkpoint-6" / "trainer_state.json").read_text())
    lines = [line for line in state["log_history"] if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["stage"] for line in lines] == [0, 0, 1, 1, 1, 1]
    assert [[n for n in ("loss_warm", "loss_ae") if n in line] for line in lines[1:3]] == [["loss_warm"], ["loss_ae"]]
    assert sum(n for cause, n in lines[-1].items() if cause.startswith("rows/skipped")) == 2
    assert [line["step"] for line in state["log_history"] if "eval_loss" in line] == [3, 6]
    assert (tmp_path / "out" / "samples.jsonl").read_text().count("\n") == 2
    assert load_settings(tmp_path / "out" / "settings.yaml") == load_settings(path)


def test_a_run_that_was_killed_goes_on_to_the_same_numbers(config, tmp_path):
    path = config(TEXTS)
    adapter = recipes.pretrain(load_settings(path))
    whole, digest = history(tmp_path, 6), (adapter / "icae_config.json").read_text()
    (tmp_path / "out").rename(tmp_path / "whole")
    script = (
        "import functools, os, signal, sys, torch, transformers\n"
        "from icae_fast.training import pretrain\n"
        "from icae_fast.training.loop import train as run\n"
        "class Kill(transformers.TrainerCallback):\n"
        "    def on_step_begin(self, args, state, control, **kwargs):\n"
        "        if state.global_step == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "run.ICAETrainer = functools.partial(run.ICAETrainer, callbacks=[Kill()])\n"
        "torch.set_num_threads(1)\n"
        "pretrain.main(sys.argv[1:])"
    )
    killed = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=100, cwd=ROOT
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "out" / "checkpoint-2").is_dir()
    adapter = recipes.pretrain(load_settings(path))
    assert history(tmp_path, 6) == whole
    assert (adapter / "icae_config.json").read_text() == digest
    # A third call has nothing to do.
    assert (recipes.pretrain(load_settings(path)) / "icae_config.json").read_text() == digest


@pytest.mark.usefixtures("default_handlers")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_is_saved_and_goes_on_to_the_same_numbers(config, tmp_path, monkeypatch, caplog, number):
    path = config(TEXTS, data={"workers": 1})
    adapter = recipes.pretrain(load_settings(path))
    whole, digest = history(tmp_path, 6), (adapter / "icae_config.json").read_text()
    (tmp_path / "out").rename(tmp_path / "whole")

    class Interrupt(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                for _ in range(3):  # a launcher repeats the signal
                    os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "ICAETrainer", functools.partial(runs.ICAETrainer, callbacks=[Interrupt()]))
        with pytest.raises(SystemExit) as stop, caplog.at_level("WARNING", "icae_fast.training"):
            pretrain.main([str(path)])
    assert stop.value.code == 130
    assert [r.getMessage() for r in caplog.records if r.module == "train"] == [
        f"interrupted: {tmp_path}/out/checkpoint-3 has the run so far; start it again to continue"
    ]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    adapter = recipes.pretrain(load_settings(path))
    assert history(tmp_path, 6) == whole
    assert (adapter / "icae_config.json").read_text() == digest


@pytest.mark.usefixtures("default_handlers")
def test_an_interrupt_before_the_first_step_says_where_the_run_stands(config, tmp_path, monkeypatch, caplog):
    path = config(TEXTS)
    monkeypatch.setattr(runs, "load_icae", lambda settings: os.kill(os.getpid(), signal.SIGTERM))
    for written, told in ((False, "before the first checkpoint"), (True, "out/checkpoint-2 has the run so far")):
        if written:
            (tmp_path / "out" / "checkpoint-2").mkdir(parents=True)
            monkeypatch.setattr(runs, "find_checkpoint", lambda *_: None)
        caplog.clear()
        with pytest.raises(SystemExit) as stop, caplog.at_level("WARNING", "icae_fast.training"):
            pretrain.main([str(path)])
        assert stop.value.code == 130
        assert told in caplog.text


FROM_A_CODE = [
    {"steps": 2, "objectives": {"code": 1}, "max_tokens": 8, "learning_rate": 3e-4, "token_lr_factor": 30.0},
    {"steps": 2, "objectives": {"warm": 1}, "max_tokens": 8, "learning_rate": 2e-3},
    {"steps": 2, "objectives": {"ae": 1}, "max_tokens": 16},
]


@pytest.mark.parametrize(("resumed_from", "optim"), [(1, "soap"), (3, "adamw_torch_fused"), (3, "soap"), (5, "soap")])
def test_a_run_that_begins_with_a_slot_code_goes_on_from_any_stage(config, tmp_path, resumed_from, optim):
    path = config(
        TEXTS, stages=FROM_A_CODE, distillation={"alpha": 0.0},
        adapter={"slot_scale": "embedding_norm", "memory_positions": "spread", "sink_token": "bos"},
        train={"save_steps": 1, "lr_scheduler_type": "linear", "save_total_limit": 9, "token_lr_factor": 4.0,
               "optim": optim},
    )  # fmt: skip
    adapter = recipes.pretrain(load_settings(path))
    whole, digest = history(tmp_path, 6), (adapter / "icae_config.json").read_text()
    named = [[n for n in ("loss_code", "loss_warm", "loss_ae") if n in line] for line in whole]
    assert named[1::2] == [["loss_code"], ["loss_warm"], ["loss_ae"]]
    states = torch.load(tmp_path / "out" / "checkpoint-6" / "optimizer.pt", weights_only=True)["state"]
    rotated = {name for name, state in states.items() if "basis_0" in state or "basis_1" in state}
    assert rotated == ({n for n in states if "adapter" in n} if optim == "soap" else set())
    for step in range(resumed_from + 1, 7):
        shutil.rmtree(tmp_path / "out" / f"checkpoint-{step}")
    adapter = recipes.pretrain(load_settings(path))
    assert history(tmp_path, 6) == whole
    assert (adapter / "icae_config.json").read_text() == digest


def test_a_run_that_ends_within_the_code_says_so(config, tmp_path, monkeypatch, capsys, caplog):
    path = config(
        [*TEXTS], stages=FROM_A_CODE, distillation={"alpha": 0.0}, data={"eval": str(tmp_path / "rows.jsonl")},
        train={"save_steps": 1, "eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "loss_ae"},
        evaluation={"samples": 2, "restore_tokens": 0},
    )  # fmt: skip

    def run(*options):
        caplog.clear()
        with pytest.raises(SystemExit) as stop, caplog.at_level("WARNING", "icae_fast.training"):
            pretrain.main([str(path), *options])
        assert stop.value.code == 0
        newest = list_checkpoints(tmp_path / "out")[-1]
        return capsys.readouterr().out, json.loads((newest / "trainer_state.json").read_text())

    out, state = run("--set", "train.max_steps=2")
    assert "no step has trained its encoder" in out
    assert "Try it" not in out
    assert (
        "max_steps is 2: the run ends in stage 0 (code), before the last stage, 2; it trains no encoder" in caplog.text
    )
    assert [line["step"] for line in state["log_history"] if "eval_loss_ae" in line] == [1, 2]
    assert state["best_global_step"] is None
    out, state = run("--set", "train.max_steps=3")
    assert "Try it" in out
    assert caplog.text.count("max_steps is 3: the run ends in stage 1 (warm), before the last stage, 2\n") == 1
    assert state["best_global_step"] == 3
    out, state = run()
    assert "Try it" in out
    assert "max_steps" not in caplog.text.replace("changed settings: train.max_steps", "")
    assert state["best_global_step"] >= 3


ACCELERATE = ("accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
              "--main_process_port", "0")  # fmt: skip


@pytest.mark.parametrize(
    ("launcher", "told"),
    [
        ((*ACCELERATE, "--cpu", "--num_processes", "1"), ""),
        ((*ACCELERATE, "--multi_gpu", "--num_processes", "2"), ""),
        ((*ACCELERATE, "--config_file", "docs/accelerate-fsdp2.yaml", "--num_processes", "2"), "over 2 processes"),
        (("torch.distributed.run", "--nproc-per-node=2", "--standalone"), ""),
    ],
    ids=["plain", "ddp", "fsdp", "torchrun"],
)
def test_a_launch_without_a_gpu_is_the_same_run(config, tmp_path, monkeypatch, launcher, told):
    path = config(TEXTS, adapter={"lora_dropout": 0.0})
    recipes.pretrain(load_settings(path))
    alone = history(tmp_path, 6)
    (tmp_path / "out").rename(tmp_path / "alone")
    values = yaml.safe_load(path.read_text())
    del values["train"]["use_cpu"]
    path.write_text(yaml.safe_dump(values))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = [sys.executable, "-m", *launcher, "-m", "icae_fast.training.pretrain", str(path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("Try it: icae-fast compress") == 1
    assert told in ran.stderr
    together = history(tmp_path, 6)
    assert len(together) == len(alone)
    for ours, theirs in zip(together, alone, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_processes_that_do_not_find_each_other_are_refused(config, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    settings = load_settings(config(TEXTS, train={"use_cpu": False}))
    with pytest.raises(ConfigError, match="2 processes were launched, but 1 works together"):
        recipes.pretrain(settings)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="5 processes were launched, but 4 work together"):
        check_world(4, {"WORLD_SIZE": "5"})
    check_world(4, {"WORLD_SIZE": "4"})
    check_world(1, {})


def test_fine_tuning_goes_on_from_a_pretrained_adapter(config, tmp_path, monkeypatch, capsys):
    recipes.pretrain(load_settings(config(TEXTS)))
    rows = [{"input": words(30, i), "prompt": words(4, 50 + i), "answer": words(6, 90 + i)} for i in range(8)]
    (tmp_path / "out").rename(tmp_path / "pretrained")
    path = config(rows, model={"adapter": str(tmp_path / "pretrained" / "adapter")},
                  stages=[{"steps": 2, "objectives": {"ft": 1}, "max_tokens": 32}])  # fmt: skip
    values = yaml.safe_load(path.read_text())
    del values["adapter"]
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(SystemExit) as stop:
        finetune.main([str(path), "--set", "train.learning_rate=1e-3"])
    assert stop.value.code == 0
    assert "Try it: icae-fast compress" in capsys.readouterr().out
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["log_history"][0]["loss_ft"] > 0


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"train": "absent.jsonl"}}, "absent.jsonl"),
        ({"stages": [{"steps": 2, "objectives": {"ft": 1}, "max_tokens": 8}]}, "'ft'"),
        ({"model": {"name": "absent/model"}}, "absent/model"),
        ({"train": {"resume": "absent"}}, "train.resume names absent"),
        ({"adapter": {"memory_size": 4000}}, "positions"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(config, tmp_path, monkeypatch, capsys, sections, message):
    with pytest.raises(SystemExit) as stop:
        pretrain.main([str(config(TEXTS, **sections))])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "settings.yaml").exists()


def test_another_adapter_does_not_go_on_from_a_checkpoint(config, tmp_path):
    recipes.pretrain(load_settings(config(TEXTS)))
    with pytest.raises(ValueError, match=r"adapter\.lora_rank differs"):
        recipes.pretrain(load_settings(config(TEXTS, adapter={"lora_rank": 8})))


def test_damaged_settings_of_a_run_are_one_error(config, tmp_path):
    settings = load_settings(config(TEXTS, stages=[{"steps": 1, "objectives": {"ae": 1}, "max_tokens": 8}]))
    adapter = recipes.pretrain(settings)
    for content in (b"", b"- 1\n", b"{x: \n", b"\xff\xfe\x00", b"!!python/name:os.system"):
        (tmp_path / "out" / "settings.yaml").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"settings\.yaml is damaged .* delete it to continue"):
            recipes.pretrain(settings)
    (tmp_path / "out" / "settings.yaml").unlink()
    assert recipes.pretrain(settings) == adapter
