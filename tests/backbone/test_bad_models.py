"""Invalid configs and unsupported base models raise one typed error that says what to do."""

import pytest
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config

from icae_fast import ICAE, ICAEConfig, errors

pytestmark = pytest.mark.usefixtures("one_thread")

Invalid, TooLong = errors.InvalidInputError, errors.ContextTooLongError


class TestConfig:
    @pytest.mark.parametrize(
        ("field", "value"),
        [("memory_size", 0), ("memory_size", 2.0), ("memory_size", True), ("compression_rate", -1), ("lora_rank", "8"),
         ("lora_rank", 0), ("lora_alpha", -1.0), ("lora_alpha", float("nan")), ("lora_alpha", None),
         ("lora_dropout", 1.0), ("lora_dropout", -0.1), ("memory_positions", "middle"),
         ("slot_scale", "big"), ("prompt_format", None)],
    )  # fmt: skip
    def test_values_out_of_range(self, field, value):
        with pytest.raises(errors.ConfigError, match=f"{field} is .*; it must be "):
            ICAEConfig(**{field: value})
        with pytest.raises(errors.ConfigError, match=field):
            ICAEConfig().replace(**{field: value})

    def test_unknown_fields(self):
        with pytest.raises(
            errors.ConfigError, match=r"unknown config fields depth, turbo; the fields are .*lora_alpha"
        ):
            ICAEConfig.from_dict({"turbo": 1, "depth": 2})

    def test_good_values(self):
        assert ICAEConfig(lora_dropout=0, lora_alpha=0).lora_scale == 0
        assert ICAEConfig(slot_scale="none").slot_scale is None


class QuantisedLinear(nn.Linear):
    """A stand-in for a quantisation library's linear layer."""


class TestModels:
    def test_another_architecture(self):
        config = GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=96, bos_token_id=1, eos_token_id=2)
        with pytest.raises(
            errors.UnsupportedModelError, match=r"type 'gpt2' are not supported; use .*llama, ministral, mistral, qwen2"
        ):
            ICAE.from_base(AutoModelForCausalLM.from_config(config))

    def test_no_causal_language_model(self, make_base):
        with pytest.raises(errors.UnsupportedModelError, match="use a causal language model"):
            ICAE.from_base(make_base().model)
        with pytest.raises(errors.UnsupportedModelError, match="'Linear' are not supported"):
            ICAE.from_base(nn.Linear(2, 2))

    def test_wrapped_by_peft_and_the_advice_helps(self, make_base, make_icae):
        peft = pytest.importorskip("peft", reason="PEFT is not installed (it comes with the extra `bench`)")
        wrapped = peft.get_peft_model(make_base(), peft.LoraConfig(target_modules=["q_proj"]))
        for model in (wrapped, wrapped.get_base_model()):
            with pytest.raises(
                errors.UnsupportedModelError, match=r"PEFT adapters; pass the model that `model.unload\(\)`"
            ):
                ICAE.from_base(model)
        assert make_icae(base=wrapped.unload()).compress([5])[0].n_slots == 4

    @pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
    def test_quantised_layers(self, make_base, name):
        base = make_base()
        setattr(base.model.layers[0].self_attn, name, QuantisedLinear(32, 32))
        with pytest.raises(errors.UnsupportedModelError, match=f"{name} is a QuantisedLinear; load .* unquantised"):
            ICAE.from_base(base)

    def test_attention_dropout(self, make_base):
        with pytest.raises(errors.UnsupportedModelError, match=r"load it with attention_dropout=0\.0"):
            ICAE.from_base(make_base(attention_dropout=0.1))
