"""Checkpoints in the reference's format: reading, writing, and errors for those that do not fit."""

import json
import os
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from helpers.checkpoints import assert_same
from icae_fast import ICAE
from icae_fast.errors import BaseModelMismatchError, CheckpointError, NonFiniteError
from icae_fast.io.checkpoints import lora_key

pytestmark = pytest.mark.usefixtures("one_thread")


class TestReferenceFiles:
    @pytest.fixture
    def tensors(self, make_icae):
        return {n: p.detach().clone() for n, p in make_icae().reference_named_parameters()}

    def test_v1(self, tensors, make_icae, make_base, tmp_path, random_ids):
        """A `.pt` file with keys of an older PEFT and zeros for LLaMA's weights."""
        v1 = {n.replace(".default", ""): t for n, t in tensors.items()}
        v1 |= {f"icae.base_model.model.{n}": torch.zeros_like(t) for n, t in make_base().state_dict().items()}
        v1["icae.base_model.model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        torch.save(v1, tmp_path / "v1.pt")
        icae = ICAE.from_reference_checkpoint(tmp_path / "v1.pt", make_base(), lora_alpha=4)
        assert icae.config.prompt_format == "v1"
        assert_same(icae, make_icae(), random_ids(30))

    @pytest.mark.parametrize("suffix", ["safetensors", "bin"])
    def test_shards_with_an_index(self, tensors, make_icae, make_base, tmp_path, random_ids, suffix):
        name = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[suffix]
        keys = list(tensors)
        shards = {f"model-0000{i}-of-00002.{suffix}": keys[i - 1 :: 2] for i in (1, 2)}
        for shard, held in shards.items():
            write = save_file if suffix == "safetensors" else torch.save
            write({key: tensors[key] for key in held}, tmp_path / shard)
        index = tmp_path / f"{name}.index.json"
        files = {key: shard for shard, held in shards.items() for key in held}
        index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))
        for path in (tmp_path, index, tmp_path / name):
            icae = ICAE.from_reference_checkpoint(path, make_base(), lora_alpha=4)
            assert icae.config.prompt_format == ("chat" if suffix == "safetensors" else "v1")
            assert_same(icae, make_icae(prompt_format=icae.config.prompt_format), random_ids(30))
        index.write_text(json.dumps({"weight_map": files | {"more": next(iter(shards))}}))
        with pytest.raises(CheckpointError, match=r"lacks more, which .*index.json lists; download it again"):
            ICAE.from_reference_checkpoint(index, make_base())
        (tmp_path / next(iter(shards))).unlink()
        with pytest.raises(CheckpointError, match=r"there is no file .*model-00001-of-00002"):
            ICAE.from_reference_checkpoint(index, make_base())

    @pytest.mark.parametrize(
        "text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}',
                 '{"weight_map": {"a": "../x.bin"}}', '{"weight_map": {"a": "/x.bin"}}', "9" * 5000, "[" * 10**5],
    )  # fmt: skip
    def test_a_damaged_index(self, make_base, tmp_path, text):
        (tmp_path / "x.bin.index.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"x.bin.index.json is damaged .*download it again"):
            ICAE.from_reference_checkpoint(tmp_path / "x.bin", make_base())

    def test_a_folder_without_a_checkpoint(self, make_base, tmp_path):
        with pytest.raises(CheckpointError, match=r"holds none of model.safetensors, .*; pass the file's path"):
            ICAE.from_reference_checkpoint(tmp_path, make_base())

    @pytest.mark.parametrize("prefix", ["icae.base_model.model.", "decoder."])
    def test_base_weights_are_compared(self, tensors, make_base, tmp_path, prefix):
        base = make_base()
        carried = {prefix + n.replace("q_proj.", "q_proj.base_layer."): t for n, t in base.state_dict().items()}
        embedding = prefix + "model.embed_tokens.weight"
        carried[embedding] = torch.cat((carried[embedding], torch.randn(8, 32)))  # rows for added tokens
        path = tmp_path / "whole.safetensors"
        save_file({n: t.contiguous().clone() for n, t in (tensors | carried).items()}, path)
        icae = ICAE.from_reference_checkpoint(path, base)
        assert torch.equal(icae.memory_token_embed.weight, tensors["memory_token_embed.weight"])
        with pytest.raises(BaseModelMismatchError, match="another base model"):
            ICAE.from_reference_checkpoint(path, make_base(seed=5))
        save_file(tensors | {prefix + "model.layers.7.mlp.up_proj.weight": torch.ones(2)}, path)
        with pytest.raises(BaseModelMismatchError, match="does not have"):
            ICAE.from_reference_checkpoint(path, base)

    def test_a_bf16_checkpoint_with_fp16_base_weights(self, tensors, make_base, tmp_path):
        whole = {n: t.bfloat16() for n, t in tensors.items()}
        whole |= {f"icae.base_model.model.{n}": t.half() for n, t in make_base().state_dict().items()}
        torch.save(whole, tmp_path / "half.pt")
        icae = ICAE.from_reference_checkpoint(tmp_path / "half.pt", make_base().bfloat16())
        assert torch.equal(icae.memory_token_embed.weight.bfloat16(), whole["memory_token_embed.weight"])

    def test_all_missing_unknown_and_misshaped_keys_are_listed(self, tensors, make_base, tmp_path):
        gone, wrong = lora_key(1, "v", "B"), lora_key(2, "q", "B")
        del tensors[gone]
        tensors |= {wrong: torch.zeros(5, 3), "icae.surprise": torch.ones(1)}
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(CheckpointError) as caught:
            ICAE.from_reference_checkpoint(tmp_path / "x.safetensors", make_base())
        for part in (f"missing {gone}", "unknown icae.surprise", f"misshaped {wrong}: (5, 3), expected (32, 3)"):
            assert part in str(caught.value)

    def test_of_very_many_wrong_keys_some_are_listed_and_all_are_counted(self, tensors, make_base, tmp_path):
        save_file(tensors | {f"extra.{i}": torch.ones(1) for i in range(30)}, tmp_path / "x.safetensors")
        with pytest.raises(CheckpointError, match="and 18 more"):
            ICAE.from_reference_checkpoint(tmp_path / "x.safetensors", make_base())

    def test_a_file_of_something_else(self, tensors, make_base, tmp_path):
        save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
        with pytest.raises(CheckpointError, match=r"no ICAE checkpoint: it needs memory_token_embed.weight"):
            ICAE.from_reference_checkpoint(tmp_path / "x.safetensors", make_base())
        tensors[lora_key(0, "q", "A")] = torch.zeros(9, 32)
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(CheckpointError, match=r"mixes LoRA ranks \[3, 9\]"):
            ICAE.from_reference_checkpoint(tmp_path / "x.safetensors", make_base())

    def test_nan_in_a_checkpoint_is_named(self, tensors, make_base, tmp_path):
        tensors[lora_key(2, "v", "A")][1, 1] = float("nan")
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(NonFiniteError, match=r"layers\.2\.self_attn\.v_proj\.lora_A.*earlier checkpoint"):
            ICAE.from_reference_checkpoint(tmp_path / "x.safetensors", make_base())

    @pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
    def test_no_file(self, make_base, tmp_path, name):
        with pytest.raises(CheckpointError, match=r"there is no file .*check the path"):
            ICAE.from_reference_checkpoint(tmp_path / name, make_base())

    def test_a_pickle_with_objects_is_not_run(self, make_base, tmp_path):
        class Payload:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "ran"),)

        bare = pickle.dumps(Payload(), protocol=2)
        for save in (lambda p: torch.save({"w": Payload()}, p), lambda p: p.write_bytes(bare)):
            save(tmp_path / "x.pt")
            with pytest.raises(CheckpointError, match="more than tensors"):
                ICAE.from_reference_checkpoint(tmp_path / "x.pt", make_base())
        assert not (tmp_path / "ran").exists()

    def test_a_pt_file_that_grows_when_it_is_read(self, tensors, make_base, tmp_path):
        """8 KB that hold 64 MB of zeros, and a tensor of a trillion elements in the place of one."""
        bomb = tmp_path / "x.pt"
        torch.save(tensors | {"memory_token_embed.weight": torch.zeros(2**19, 32)}, tmp_path / "plain.pt")
        with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as small:
            for name in plain.namelist():
                small.writestr(name, plain.read(name))
        assert bomb.stat().st_size < 2**18
        with pytest.raises(CheckpointError, match=r"its records have .* bytes, more than the file"):
            ICAE.from_reference_checkpoint(bomb, make_base())
        for wide in (torch.zeros(1).expand(10**6, 10**6), torch.eye(9).to_sparse(), torch.empty(9, 9, device="meta")):
            torch.save(tensors | {"memory_token_embed.weight": wide}, bomb)
            with pytest.raises(CheckpointError, match=r"token_embed.weight has more elements than the file holds"):
                ICAE.from_reference_checkpoint(bomb, make_base())

    @pytest.mark.parametrize("content", [[torch.ones(1)], {"step": 3}, {"state": {"w": torch.ones(1)}}])
    def test_a_pt_file_of_another_make(self, make_base, tmp_path, content):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(CheckpointError, match=r"no dictionary of tensors.*state dict"):
            ICAE.from_reference_checkpoint(tmp_path / "x.pt", make_base())
