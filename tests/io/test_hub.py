"""Base models and tokenizers that cannot be loaded, or only in part: one typed error that says what to do."""

import json
import logging
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from icae_fast import ICAE, ICAEConfig
from icae_fast.errors import CheckpointError, MissingPackageError
from icae_fast.io.hub import load_base_model, load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def base(make_base, make_tokenizer, tmp_path):
    """The folder of a base model and its tokenizer."""
    make_base().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def load(folder, **options):
    return load_base_model(folder, ICAEConfig(), torch.float32, **options)


class TestWeightsThatDoNotFitTheConfig:
    def test_more_layers_than_weights(self, base):
        edit(base / "config.json", num_hidden_layers=4)
        with pytest.raises(CheckpointError, match=r"lack model\.layers\.3\..* and 6 more; correct the config"):
            load(base)

    def test_fewer_layers_than_weights(self, base):
        edit(base / "config.json", num_hidden_layers=2)
        with pytest.raises(CheckpointError, match=r"the config has no model\.layers\.2\..* and 6 more; correct the"):
            load(base)

    def test_biases_that_the_config_does_not_mention(self, make_base, make_tokenizer, tmp_path):
        make_base("llama3").save_pretrained(tmp_path)
        make_tokenizer().save_pretrained(tmp_path)
        load(tmp_path)
        edit(tmp_path / "config.json", mlp_bias=False)
        with pytest.raises(CheckpointError, match=r"the config has no model\.layers\.0\.mlp\.down_proj\.bias"):
            load(tmp_path)

    def test_other_shapes(self, base):
        edit(base / "config.json", intermediate_size=64)
        with pytest.raises(CheckpointError, match=r"base model .* cannot be loaded \(.*; pass base_model="):
            load(base)

    def test_a_missing_head_and_rotary_frequencies_of_an_old_checkpoint(self, base):
        weights = load_file(base / "model.safetensors")
        old = weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
        save_file(old, base / "model.safetensors", {"format": "pt"})
        load(base)
        del weights["lm_head.weight"]
        save_file(weights, base / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=r"the weights lack lm_head\.weight; correct the config"):
            load(base)

    def test_a_tied_head_is_not_missing(self, make_base, make_tokenizer, tmp_path):
        make_base("llama-mha").save_pretrained(tmp_path)
        make_tokenizer().save_pretrained(tmp_path)
        assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
        load(tmp_path)


class TestFoldersThatCannotBeLoaded:
    @pytest.mark.parametrize(
        ("method", "fields"),
        [("bitsandbytes", {"load_in_4bit": True}), ("gptq", {"bits": 4}), ("awq", {"bits": 4})],
    )
    def test_a_quantised_model_whose_package_is_missing(self, base, method, fields):
        edit(base / "config.json", quantization_config={"quant_method": method, **fields})
        with pytest.raises(MissingPackageError, match=r"base model .* needs a package .*; install it, .* unquantised"):
            load(base)

    @pytest.mark.parametrize(
        "text", ["", "{", "[]", "3", "null", "{}", '{"model_type": "llama", "num_attention_heads": 0}',
                 '{"model_type": 7}', '{"model_type": "nothing"}', '{"model_type": "llama", "hidden_size": "x"}',
                 "[" * 10**5, '{"model_type": "llama", "rope_parameters": 7}', "\x00\xff"],
    )  # fmt: skip
    def test_a_broken_config(self, base, text):
        (base / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"base model .* cannot be loaded \(.*; pass base_model="):
            load(base)

    @pytest.mark.parametrize(
        ("name", "text"),
        [("tokenizer.json", ""), ("tokenizer.json", "{}"), ("tokenizer.json", '{"model": {"type": "nothing"}}'),
         ("tokenizer.json", "["), ("tokenizer_config.json", "{"), ("tokenizer_config.json", "[]"),
         ("tokenizer_config.json", '{"tokenizer_class": 7}')],
    )  # fmt: skip
    def test_a_broken_tokenizer(self, base, caplog, name, text):
        (base / name).write_text(text)
        with pytest.raises(CheckpointError, match=r"tokenizer of .* cannot be loaded \(.*; pass tokenizer="):
            load(base)
        with caplog.at_level(logging.WARNING, "icae_fast.io.hub"):
            assert load_tokenizer(str(base), required=False) is None
        assert "cannot be loaded" in caplog.text

    def test_a_folder_without_a_tokenizer_is_no_matter_where_none_is_needed(self, make_base, tmp_path, caplog):
        make_base().save_pretrained(tmp_path)
        assert load_tokenizer(str(tmp_path), required=False) is None
        assert not caplog.text

    def test_no_memory_is_not_called_damage(self, base, monkeypatch):
        for error in (MemoryError(), torch.OutOfMemoryError("CUDA")):

            def fail(*args, error=error, **options):
                raise error

            monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fail)
            with pytest.raises(type(error)):
                load(base)

    @pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "~nobody-of-this-name/x", "~"])
    def test_names_that_are_no_names(self, make_base, name, monkeypatch, tmp_path):
        monkeypatch.setenv("HOME", str(tmp_path))
        with pytest.raises(CheckpointError):
            load(name)
        with pytest.raises(CheckpointError):
            ICAE.from_pretrained(name, make_base())


def test_a_tilde_is_the_home_folder(base, make_icae, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    make_icae().save_pretrained("~/new/adapter")
    assert not os.path.exists("~")
    icae = ICAE.from_pretrained("~/new/adapter", "~/base", torch.float32)
    assert icae.tokenizer is not None
    again = ICAE.from_reference_checkpoint("~/new/adapter/adapter.safetensors", icae.base_model)
    assert again.adapter_hash() == icae.adapter_hash()
