"""Settings files: reading them, and that every mistake is one sentence that names it."""

import pytest
import yaml

from icae_fast.cli import app as cli
from icae_fast.errors import ConfigError
from icae_fast.training.loop.settings import Settings
from icae_fast.training.loop.settings_file import changed_keys, installed_configs, load_settings

BASE = {
    "output": "out",
    "data": {"train": "texts.jsonl", "tokens_per_step": 64, "micro_batch_tokens": 32},
    "stages": [{"steps": 10, "objectives": {"ae": 1}, "max_tokens": 16}],
}


@pytest.fixture
def load(tmp_path):
    """Return `load(overrides=(), **sections)`, the settings of a file with these sections over `BASE`."""

    def make(overrides=(), **sections):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(BASE | sections))
        return load_settings(path, overrides)

    return make


def test_every_installed_config_is_sound():
    configs = installed_configs()
    assert {"smollm2-cpu-pretrain", "llama2-7b-8gpu-pretrain", "mistral-7b-8gpu-finetune"} <= configs.keys()
    for path in configs.values():
        settings = load_settings(path)
        arguments = settings.training_arguments(use_cpu=True)
        assert arguments.max_steps == settings.curriculum().total_steps


def test_papers_hyper_parameters():
    settings = load_settings(installed_configs()["llama2-7b-8gpu-pretrain"])
    config = settings.icae_config()
    assert (config.memory_size, config.lora_rank, config.max_span_tokens) == (128, 128, 512)
    assert settings.train.given()["learning_rate"] == 1e-4
    assert load_settings(installed_configs()["llama2-7b-8gpu-finetune"]).train.given()["learning_rate"] == 5e-5


def test_what_is_written_reads_as_the_same(load, tmp_path):
    settings = load(train={"learning_rate": 1e-3, "report_to": ["tensorboard"]}, model={"max_positions": 70_000})
    settings.save(tmp_path / "out")
    again = load_settings(tmp_path / "out" / "settings.yaml")
    assert again == settings
    assert changed_keys(again.to_dict(), settings.to_dict()) == []
    assert changed_keys(load(adapter={"lora_rank": 4}).to_dict(), load().to_dict()) == ["adapter.lora_rank"]


def test_the_command_line_wins(load):
    overrides = ["train.learning_rate=2e-5", "data.train=[a.jsonl, b.jsonl]", "stages.0.max_tokens=8"]
    settings = load(overrides, train={"learning_rate": 1e-3})
    assert settings.train.given()["learning_rate"] == 2e-5
    assert settings.data.train == ["a.jsonl", "b.jsonl"]
    assert settings.curriculum().stages[0].max_tokens == 8


def test_a_number_without_a_dot_is_one(tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(BASE) + "train: {learning_rate: 1e-4, adam_epsilon: 1E-6}\n")
    given = load_settings(tmp_path / "run.yaml").train.given()
    assert (given["learning_rate"], given["adam_epsilon"]) == (1e-4, 1e-6)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"trian": {}}, "unknown key trian; did you mean train"),
        ({"adapter": {"lora_rnk": 4}}, "unknown key adapter.lora_rnk; did you mean lora_rank"),
        ({"data": {"train": "x", "on_bad_rows": "skip"}}, "unknown key data.on_bad_rows; did you mean on_bad_row"),
        ({"memory": {"byte": 1}}, "unknown key memory.byte; did you mean bytes"),
        ({"distillation": {"alhpa": 1}}, "did you mean alpha"),
        ({"train": {"learning_rte": 1e-4}}, "unknown key train.learning_rte; did you mean learning_rate"),
        (
            {"stages": [{"steps": 1, "objectives": {"ae": 1}, "max_tokens": 4, "min_token": 2}]},
            "did you mean min_tokens",
        ),
        ({"data": {"train": {"pth": "x"}}}, "data.train: .*path"),
        ({"data": {}}, "data.train is missing"),
        ({"stages": []}, "no stage"),
        ({"model": {"dtype": "float16"}}, "model.dtype is 'float16'"),
        ({"adapter": {"lora_rank": "128"}}, "adapter.lora_rank is '128'"),
        ({"adapter": {"lora_rank": 0}}, "lora_rank is 0"),
        ({"train": {"max_steps": "100"}}, "train.max_steps is '100'"),
        ({"train": {"max_steps": 0}}, "train.max_steps is 0; it must be at least 1"),
        ({"train": {"lr_scheduler_type": 3}}, "train.lr_scheduler_type is 3"),
        ({"train": {"gradient_accumulation_steps": 4}}, "cannot be set: data.tokens_per_step"),
        ({"train": {"fsdp": "full_shard"}}, "cannot be set: the launch sets how"),
        ({"train": {"bf16": True}}, "cannot be set: model.dtype"),
        ({"train": {"on_nan": "ignore"}}, "train.on_nan is 'ignore'"),
        ({"train": {"eval_strategy": "steps"}}, "data.eval names no held-out rows"),
        ({"model": {"adapter": "a"}, "adapter": {"lora_rank": 4}}, "model.adapter and the section adapter"),
        ({"data": {"train": "x", "spans": [3, 2]}}, "low <= high"),
        ({"data": {"train": "x", "tokens_per_step": 8}}, "more than data.tokens_per_step"),
        ({"data": {"train": "x", "workers": 2}}, "data.workers is 2"),
        ({"memory": {"span_tokens": 0}}, "span_tokens of the activation budget is 0"),
        ({"distillation": {"alpha": 2}}, "alpha is 2"),
    ],
)
def test_a_mistake_is_one_sentence(load, sections, message):
    with pytest.raises(ConfigError, match=message) as error:
        load(**sections)
    assert "\n" not in str(error.value)


def test_all_mistakes_are_told_at_once(load):
    with pytest.raises(ConfigError, match=r"lora_rnk.*on_nan"):
        load(adapter={"lora_rnk": 4}, train={"on_nan": 1})


EVAL = {**BASE["data"], "eval": "held_out.jsonl"}


@pytest.mark.parametrize(
    ("sections", "strategy", "steps"),
    [
        ({}, "no", None),  # no held-out rows
        ({"data": EVAL}, "steps", 10),  # at the end of a run that is shorter than save_steps
        ({"data": EVAL, "train": {"save_steps": 4}}, "steps", 4),
        ({"data": EVAL, "train": {"eval_steps": 3}}, "steps", 3),
        ({"data": EVAL, "train": {"max_steps": 900}}, "steps", 500),
        ({"data": EVAL, "train": {"load_best_model_at_end": True}}, "steps", 500),
        ({"data": EVAL, "train": {"eval_strategy": "steps", "eval_steps": 2}}, "steps", 2),
        ({"data": EVAL, "train": {"eval_strategy": "no"}}, "no", None),
        ({"data": EVAL, "train": {"eval_strategy": False}}, "no", None),  # an unquoted `no` in YAML
    ],
)
def test_held_out_rows_are_evaluated_unless_switched_off(load, sections, strategy, steps):
    arguments = load(**sections).training_arguments(use_cpu=True)
    assert (arguments.eval_strategy.value, arguments.eval_steps) == (strategy, steps)


def test_a_key_may_have_its_old_name(load, caplog):
    settings = load(["data.windows_per_document=one"])
    assert settings.data.excerpts_per_document == "one"
    assert "data.windows_per_document is now called data.excerpts_per_document" in caplog.text
    with pytest.raises(ConfigError, match="give only the latter"):
        load(["data.windows_per_document=one", "data.excerpts_per_document=one"])


@pytest.mark.parametrize("override", ["train.max_steps", "=1", "output.x=1", "stages.7.steps=1", "train.seed=[1"])
def test_an_override_that_is_none(load, override):
    with pytest.raises(ConfigError, match="--set"):
        load([override])


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "\x00"])
def test_a_file_that_is_none(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load_settings(tmp_path / "run.yaml")


def test_transformers_own_complaint_becomes_a_config_error(load):
    settings = load(train={"lr_scheduler_type": "cosin"})
    with pytest.raises(ConfigError, match="cosin"):
        settings.train.arguments("out", 10, use_cpu=True)


def test_mixed_precision_of_the_launcher_is_refused(load, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ConfigError, match="--mixed_precision no"):
        load()


def test_a_launch_with_deepspeed_is_refused(load, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match="--multi_gpu"):
        load()


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_the_command_line_says_what_is_wrong(command, tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, str(tmp_path / "absent.yaml")])
    assert stop.value.code == 2
    assert "no file" in capsys.readouterr().err
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(BASE | {"modle": {}}))
    with pytest.raises(SystemExit) as stop:
        cli.main([command, str(tmp_path / "run.yaml")])
    assert stop.value.code == 2
    assert "did you mean model" in capsys.readouterr().err


def test_settings_name_all_sections():
    assert set(Settings.model_fields) == {
        "output", "model", "adapter", "data", "stages", "distillation", "memory", "evaluation", "train"
    }  # fmt: skip


def test_a_teacher_without_samples_is_told(load, caplog):
    stages = [{"steps": 1, "objectives": {"ae": 1}, "max_tokens": 8}]
    load(stages=stages, distillation={"alpha": 0.5, "objectives": ["ae"]})
    load(stages=stages, distillation={"alpha": 0.0})
    assert not caplog.text
    load(stages=stages, distillation={"alpha": 0.5})
    assert "no stage has lm or ft, so no sample has a teacher" in caplog.text
