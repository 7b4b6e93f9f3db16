"""Folders that PEFT saves are read where their LoRA is an ICAE's, and refused in a sentence otherwise."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from icae_fast import ICAE
from icae_fast.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("one_thread")
peft = pytest.importorskip("peft", reason="PEFT is not installed (it comes with the extra `bench`)")

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def save(make_base, make_icae, tmp_path):
    """`save(**options)` saves the adapter of `make_icae()` as PEFT does, and returns (folder, memory tokens)."""

    def make(**options):
        config = peft.LoraConfig(**({"r": 3, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]} | options))
        model, icae = peft.get_peft_model(copy.deepcopy(make_base()), config), make_icae()
        own = dict(model.named_parameters())
        with torch.no_grad():
            for key, parameter in icae.reference_named_parameters():
                name = key.removeprefix("icae.")
                if name in own and own[name].shape == parameter.shape:
                    own[name].copy_(parameter)
        model.save_pretrained(tmp_path)
        return tmp_path, icae.memory_token_embed.weight.detach()

    return make


def test_slots_and_answers_are_those_of_the_adapter(save, make_icae, make_base, random_ids):
    folder, tokens = save()
    icae = ICAE.from_pretrained(folder, make_base(), memory_tokens=tokens)
    expected = make_icae()
    assert (icae.config.memory_size, icae.config.compression_rate, icae.config.lora_scale) == (4, 4, 4 / 3)
    assert torch.equal(icae.compress(random_ids(30))[0].slots, expected.compress(random_ids(30))[0].slots)
    assert (
        ICAE.from_pretrained(folder, make_base(), memory_tokens=tokens, compression_rate=2).config.max_span_tokens == 8
    )


def test_memory_tokens_among_the_tensors(save, make_icae, make_base, random_ids):
    folder, tokens = save()
    tensors = load_file(folder / TENSORS) | {"base_model.model.memory_token_embed.weight": tokens}
    save_file(tensors, folder / TENSORS)
    icae = ICAE.from_pretrained(folder, make_base())
    assert torch.equal(icae.compress(random_ids(9))[0].slots, make_icae().compress(random_ids(9))[0].slots)


def test_without_memory_tokens(save, make_base):
    with pytest.raises(CheckpointError, match=r"adapter of PEFT, which holds no memory tokens; pass memory_tokens="):
        ICAE.from_pretrained(save()[0], make_base())


@pytest.mark.parametrize(
    ("options", "named"),
    [({"target_modules": ["q_proj"]}, r"target_modules=\['q_proj'\]"),
     ({"target_modules": ["q_proj", "v_proj", "up_proj"]}, "target_modules="),
     ({"use_rslora": True}, "use_rslora=True"), ({"use_dora": True}, "use_dora=True"), ({"bias": "all"}, "bias='all'"),
     ({"rank_pattern": {"v_proj": 5}}, "rank_pattern="), ({"layers_to_transform": [0]}, r"layers_to_transform=\[0\]"),
     ({"modules_to_save": ["lm_head"]}, "modules_to_save=")],
)  # fmt: skip
def test_another_lora(save, make_base, options, named):
    folder, tokens = save(**options)
    with pytest.raises(CheckpointError, match=rf"config.json has {named}.*; an ICAE's adapter is plain LoRA on"):
        ICAE.from_pretrained(folder, make_base(), memory_tokens=tokens)


@pytest.mark.parametrize("text", ["", "[]", "{}", "9" * 5000, '{"target_modules": [], "r": NaN, "lora_alpha": 1}'])
def test_a_damaged_config(save, make_base, text):
    folder, tokens = save()
    (folder / CONFIG).write_text(text)
    with pytest.raises(CheckpointError, match=r"adapter_config.json is damaged .*again"):
        ICAE.from_pretrained(folder, make_base(), memory_tokens=tokens)


@pytest.mark.parametrize("changes", [{"r": 4}, {"r": "3"}, {"lora_alpha": "x"}, {"lora_dropout": 7}])
def test_values_that_do_not_fit(save, make_base, changes):
    folder, tokens = save()
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | changes))
    with pytest.raises(CheckpointError, match="adapter"):
        ICAE.from_pretrained(folder, make_base(), memory_tokens=tokens)


def test_another_base_or_other_tokens(save, make_base):
    folder, tokens = save()
    with pytest.raises(CheckpointError, match=r"does not fit this base model and config: unknown .*layers.2"):
        ICAE.from_pretrained(folder, make_base(num_hidden_layers=2), memory_tokens=tokens)
    with pytest.raises(CheckpointError, match=r"misshaped memory_token_embed.weight"):
        ICAE.from_pretrained(folder, make_base(), memory_tokens=tokens[:, :8])
