"""Invalid configs and unsupported base models raise one typed error that says what to do."""

import accelerate
import pytest
import torch
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


class QuantisedTensor(torch.Tensor):
    """A stand-in for torchao's tensors, which plain linear layers hold."""


@pytest.fixture
def saved(make_icae, tmp_path):
    """The folder of a saved adapter."""
    make_icae().save_pretrained(tmp_path)
    return tmp_path


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
    @pytest.mark.parametrize("layer", [0, 1, 2])
    def test_quantised_layers(self, make_base, name, layer):
        base = make_base()
        setattr(base.model.layers[layer].self_attn, name, QuantisedLinear(32, 32))
        with pytest.raises(
            errors.UnsupportedModelError, match=f"{name} of layer {layer} is a QuantisedLinear; load .* unquantised"
        ):
            ICAE.from_base(base)

    @pytest.mark.parametrize("name", ["self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"])
    def test_quantised_tensors(self, make_base, name):
        base = make_base()
        linear = base.model.layers[2].get_submodule(name)
        linear.weight = nn.Parameter(QuantisedTensor(linear.weight.data), requires_grad=False)
        with pytest.raises(errors.UnsupportedModelError, match=f"layers.2.{name}.weight is a QuantisedTensor; load .*"):
            ICAE.from_base(base)

    def test_an_offloaded_model(self, saved, make_base):
        base = accelerate.cpu_offload(make_base(), execution_device=torch.device("cpu"))
        for make in (ICAE.from_base, lambda model: ICAE.from_pretrained(saved, model)):
            with pytest.raises(errors.UnsupportedModelError, match=r"weight has no values here.*without device_map"):
                make(base)

    @pytest.mark.parametrize("part", ["self_attn", "mlp", "input_layernorm"])
    def test_an_offloaded_part_of_a_layer(self, make_base, part):
        base = make_base()
        accelerate.cpu_offload(base.model.layers[1].get_submodule(part), execution_device=torch.device("cpu"))
        with pytest.raises(errors.UnsupportedModelError, match=rf"layers\.1\.{part}.* has no values here"):
            ICAE.from_base(base)

    def test_layers_of_two_dtypes(self, make_base):
        base = make_base()
        base.model.layers[1].self_attn.double()
        with pytest.raises(errors.UnsupportedModelError, match="q_proj of layer 1 is in float64 and the embedding in"):
            ICAE.from_base(base)

    def test_fewer_layers_than_the_config_says(self, make_base):
        base = make_base()
        del base.model.layers[1]
        with pytest.raises(errors.UnsupportedModelError, match="has 2 layers and its config says 3; load it again"):
            ICAE.from_base(base)

    def test_an_adapter_for_another_architecture(self, saved):
        config = GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=96, bos_token_id=1, eos_token_id=2)
        with pytest.raises(errors.UnsupportedModelError, match="'gpt2' are not supported"):
            ICAE.from_pretrained(saved, AutoModelForCausalLM.from_config(config))

    def test_attention_dropout(self, make_base):
        with pytest.raises(errors.UnsupportedModelError, match=r"load it with attention_dropout=0\.0"):
            ICAE.from_base(make_base(attention_dropout=0.1))
