"""Adapters on disk: saving, loading, and errors for every kind of wrong file."""

import errno
import fcntl
import json
import os

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers import golden
from helpers.checkpoints import assert_same
from icae_fast import ICAE, ICAEConfig
from icae_fast.errors import BaseModelMismatchError, CheckpointError, TokenizerMismatchError
from icae_fast.io import files, hub
from icae_fast.io.checkpoints import CONFIG_FILE, TENSORS_FILE, lora_key
from icae_fast.io.reference_files import read_reference_file

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def saved(make_icae, tmp_path):
    """Return (ICAE, folder of its saved adapter)."""
    icae = make_icae(memory_positions="spread", prompt_format="plain", lora_dropout=0.1)
    icae.save_pretrained(tmp_path / "adapter")
    return icae, tmp_path / "adapter"


@pytest.fixture
def base_folder(make_base, make_tokenizer, tmp_path):
    """Return the folder of a base model and its tokenizer."""
    make_base().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def edit_header(folder, **changes):
    path = folder / CONFIG_FILE
    header = json.loads(path.read_text())
    header.update(changes)
    path.write_text(json.dumps(header))


class TestRoundTrip:
    def test_with_the_base_as_an_object(self, saved, make_base, random_ids):
        icae, folder = saved
        again = ICAE.from_pretrained(folder, base_model=make_base())
        assert again.config == icae.config
        assert not again.training
        assert again.tokenizer is None
        assert_same(icae, again, random_ids(30))

    def test_with_the_base_as_a_path(self, saved, base_folder, random_ids):
        icae, folder = saved
        again = ICAE.from_pretrained(str(folder), base_model=str(base_folder), dtype=torch.float32)
        assert_same(icae, again, random_ids(30))
        assert again.tokenizer("w7")["input_ids"] == [7]
        assert again.compress("w5 w6")[0].n_source_tokens == 2

    def test_with_the_base_that_the_adapter_names(self, make_icae, base_folder, tmp_path, random_ids):
        icae = make_icae(base=AutoModelForCausalLM.from_pretrained(base_folder))
        assert icae.config.base_model == str(base_folder)
        icae.save_pretrained(tmp_path / "adapter")
        again = ICAE.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
        assert_same(icae, again, random_ids(30))

    def test_with_a_tokenizer_given_the_base_needs_none(self, saved, make_base, make_tokenizer, tmp_path):
        make_base().save_pretrained(tmp_path / "bare")
        with pytest.raises(CheckpointError, match="pass tokenizer="):
            ICAE.from_pretrained(saved[1], base_model=tmp_path / "bare")
        tokenizer = make_tokenizer()
        assert ICAE.from_pretrained(saved[1], base_model=tmp_path / "bare", tokenizer=tokenizer).tokenizer is tokenizer

    def test_into_bf16_the_adapter_stays_fp32(self, saved, base_folder, random_ids):
        icae, folder = saved
        again = ICAE.from_pretrained(folder, base_model=base_folder)
        assert again.dtype == torch.bfloat16
        for (_, a), (_, b) in zip(icae.reference_named_parameters(), again.reference_named_parameters(), strict=True):
            assert b.dtype == torch.float32
            assert torch.equal(a, b)
        assert again.compress(random_ids(9))[0].slots.dtype == torch.bfloat16

    def test_with_a_learned_gain(self, make_icae, make_base, tmp_path, random_ids):
        icae = make_icae(slot_scale="embedding_norm")
        with torch.no_grad():
            icae.slot_gain.fill_(-0.3)
        icae.save_pretrained(tmp_path)
        again = ICAE.from_pretrained(tmp_path, make_base())
        assert again.slot_gain.item() == pytest.approx(-0.3)
        assert_same(icae, again, random_ids(30))

    def test_only_the_two_files_and_the_trained_tensors_are_written(self, saved):
        icae, folder = saved
        assert sorted(p.name for p in folder.iterdir()) == [TENSORS_FILE, CONFIG_FILE]
        with safe_open(folder / TENSORS_FILE, "pt") as file:
            keys = set(file.keys())
        expected = {lora_key(i, p, f) for i in range(3) for p in "qv" for f in "AB"} | {"memory_token_embed.weight"}
        assert keys == expected
        assert "icae.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight" in keys
        header = json.loads((folder / CONFIG_FILE).read_text())
        assert header["adapter_hash"] == icae.adapter_hash()
        assert header["config"]["memory_positions"] == "spread"

    def test_it_loads_as_a_reference_checkpoint(self, make_icae, make_base, tmp_path, random_ids):
        icae = make_icae(lora_alpha=4.0)
        icae.save_pretrained(tmp_path)
        again = ICAE.from_reference_checkpoint(tmp_path / TENSORS_FILE, make_base(), lora_alpha=4.0)
        assert (again.config.memory_size, again.config.lora_rank, again.config.prompt_format) == (4, 3, "chat")
        assert_same(icae, again, random_ids(30))

    def test_the_golden_adapter_keeps_its_keys(self, tmp_path):
        icae = ICAE.from_reference_checkpoint(golden.reference_checkpoint_path(), golden.load_base())
        icae.save_pretrained(tmp_path)
        ours, theirs = load_file(tmp_path / TENSORS_FILE), load_file(golden.reference_checkpoint_path())
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[n], theirs[n].float()) for n in theirs)


@pytest.fixture(scope="module")
def good_files(tmp_path_factory, make_icae):
    """Return files with the same tensors in the three formats."""
    folder = tmp_path_factory.mktemp("good")
    tensors = {n: p.detach() for n, p in make_icae().reference_named_parameters()}
    save_file(tensors, folder / "x.safetensors")
    torch.save(tensors, folder / "zip.pt")
    torch.save(tensors, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    return sorted(folder.iterdir())


@hypothesis.settings(max_examples=150)
@hypothesis.given(data=st.data())
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_is_a_checkpoint_error_or_reads_as_tensors(good_files, tmp_path_factory, data):
    path = data.draw(st.sampled_from(good_files))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, min(len(content), 3000) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.one_of(st.none(), st.integers(0, len(content))))]
    damaged = tmp_path_factory.getbasetemp() / f"damaged{path.suffix}"
    damaged.write_bytes(content)
    try:
        tensors = read_reference_file(damaged)
    except CheckpointError as error:
        assert str(damaged) in str(error)  # noqa: PT017
        assert "again" in str(error)  # noqa: PT017
    else:
        assert all(isinstance(t, torch.Tensor) for t in tensors.values())


@pytest.mark.parametrize("content", [b"", b"PK", b"garbage" * 99, b"\x80\x02}q\x00.", b"\x08\0\0\0\0\0\0\0{}      "])
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
@pytest.mark.filterwarnings("ignore")
def test_garbage_is_refused(make_base, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x.(pt|safetensors)"):
        ICAE.from_reference_checkpoint(tmp_path / name, make_base())


class TestSavedFolders:
    def test_another_shape_of_base(self, saved, make_base):
        with pytest.raises(BaseModelMismatchError, match=r"intermediate_size 48 \(here 64\).*trained on"):
            ICAE.from_pretrained(saved[1], make_base(intermediate_size=64))
        with pytest.raises(BaseModelMismatchError, match=r"model_type llama \(here mistral\)"):
            ICAE.from_pretrained(saved[1], make_base("mistral-full"))

    def test_the_same_shape_with_other_weights(self, saved, make_base):
        with pytest.raises(BaseModelMismatchError, match=r"other weights .*pass the base model it was trained on"):
            ICAE.from_pretrained(saved[1], make_base(seed=1))

    def test_the_same_weights_in_another_dtype_pass(self, saved, make_base):
        for base in (make_base().bfloat16(), make_base().half().bfloat16(), make_base().double()):
            ICAE.from_pretrained(saved[1], base)

    def test_a_folder_without_an_adapter(self, tmp_path, make_base):
        with pytest.raises(CheckpointError, match=f"no adapter: there is no {CONFIG_FILE}"):
            ICAE.from_pretrained(tmp_path, make_base())

    def test_a_name_that_is_nowhere(self, make_base):
        for name in ("no-such-folder", "nobody/nothing", "a b"):
            with pytest.raises(CheckpointError, match=r"neither a folder with an adapter, nor .* nor a hub"):
                ICAE.from_pretrained(name, make_base())

    def test_the_tensors_are_missing_or_truncated(self, saved, make_base):
        path = saved[1] / TENSORS_FILE
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match=r"truncated .*again"):
            ICAE.from_pretrained(saved[1], make_base())
        path.unlink()
        with pytest.raises(CheckpointError, match="there is no file"):
            ICAE.from_pretrained(saved[1], make_base())

    def test_tensors_of_another_adapter(self, saved, make_icae, make_base, tmp_path):
        make_icae(seed=0, memory_positions="spread", lora_rank=3).save_pretrained(tmp_path / "other")
        tensors = load_file(tmp_path / "other" / TENSORS_FILE)
        tensors["memory_token_embed.weight"][0, 0] += 1
        save_file(tensors, saved[1] / TENSORS_FILE)
        with pytest.raises(CheckpointError, match=f"not the file that {CONFIG_FILE} was saved with"):
            ICAE.from_pretrained(saved[1], make_base())

    @pytest.mark.parametrize(
        "text", ["", "{", "[]", "null", "3", '{"format_version": 1}', "\x00",
                 '{"format_version": "1", "config": {}, "base": {}, "adapter_hash": ""}',
                 '{"format_version": 1, "config": [], "base": {}, "adapter_hash": ""}',
                 '{"format_version": 1, "config": {}, "base": "llama", "adapter_hash": ""}'],
    )  # fmt: skip
    def test_a_damaged_header(self, saved, make_base, text):
        (saved[1] / CONFIG_FILE).write_text(text)
        with pytest.raises(CheckpointError, match=r"is damaged .*again"):
            ICAE.from_pretrained(saved[1], make_base())

    @pytest.mark.parametrize(
        "value", ["9" * 5000, "[" * 90 + "]" * 90, "[" * 10**5 + "]" * 10**5, "NaN", "-Infinity", "1e999", '""x'],
        ids=["digits", "nested", "deep", "nan", "infinity", "overflow", "syntax"],
    )  # fmt: skip
    def test_a_hostile_header(self, saved, make_base, value):
        path = saved[1] / CONFIG_FILE
        path.write_text(path.read_text().replace('"base_model": null', f'"base_model": {value}'))
        assert value in path.read_text()
        with pytest.raises(CheckpointError, match=r"is damaged .*again"):
            ICAE.from_pretrained(saved[1], make_base())

    @pytest.mark.parametrize("field", ["memory_size", "lora_rank"])
    @pytest.mark.parametrize("value", [10**15, 10**400])
    def test_sizes_are_compared_with_the_tensors_before_memory_is_taken(self, saved, make_base, field, value):
        edit_header(saved[1], config=json.loads((saved[1] / CONFIG_FILE).read_text())["config"] | {field: value})
        with pytest.raises(CheckpointError, match=r"memory tokens and LoRA rank .*, and its config .*again"):
            ICAE.from_pretrained(saved[1], make_base())

    def test_tensors_of_another_kind_of_numbers(self, saved, make_base):
        tensors = load_file(saved[1] / TENSORS_FILE)
        for dtype in (torch.int64, torch.complex64):
            changed = tensors | {lora_key(0, "q", "A"): tensors[lora_key(0, "q", "A")].to(dtype)}
            save_file(changed, saved[1] / TENSORS_FILE)
            with pytest.raises(CheckpointError, match=r"q_proj.lora_A.default.weight in (int64|complex64)"):
                ICAE.from_pretrained(saved[1], make_base())

    def test_a_header_from_the_future_or_with_a_wrong_config(self, saved, make_base):
        edit_header(saved[1], format_version=99)
        with pytest.raises(CheckpointError, match="install a newer icae-fast"):
            ICAE.from_pretrained(saved[1], make_base())
        edit_header(saved[1], format_version=1, config={"memory_size": 4, "turbo": True})
        with pytest.raises(CheckpointError, match="unknown config field turbo"):
            ICAE.from_pretrained(saved[1], make_base())

    def test_a_damaged_identity(self, saved, make_base):
        edit_header(saved[1], base={"fingerprint": 7})
        with pytest.raises(BaseModelMismatchError, match="pass the base model it was trained on"):
            ICAE.from_pretrained(saved[1], make_base())

    def test_no_base_to_go_by(self, saved, tmp_path):
        with pytest.raises(CheckpointError, match="does not name its base model; pass base_model="):
            ICAE.from_pretrained(saved[1])
        for name in ("no/such-base", str(tmp_path)):
            with pytest.raises(CheckpointError, match=r"cannot be loaded .*pass base_model="):
                ICAE.from_pretrained(saved[1], base_model=name)

    def test_a_truncated_base(self, saved, base_folder):
        weights = base_folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        with pytest.raises(CheckpointError, match="cannot be loaded"):
            ICAE.from_pretrained(saved[1], base_model=base_folder)

    def test_a_tokenizer_of_another_size(self, saved, make_base, make_tokenizer):
        for size in (97, 80):
            with pytest.raises(TokenizerMismatchError, match=f"{size} tokens and the base model 96.*own tokenizer"):
                ICAE.from_pretrained(saved[1], make_base(), tokenizer=make_tokenizer(size))
        ICAE.from_pretrained(saved[1], make_base(), tokenizer=make_tokenizer(94))  # a few unused rows are common


class TestWritingIsAtomic:
    @pytest.fixture
    def untouched(self, saved):
        """Return a saved adapter; fail after the test unless its folder is byte for byte unchanged."""
        icae, folder = saved
        before = {p.name: p.read_bytes() for p in folder.iterdir()}
        with torch.no_grad():
            icae.memory_token_embed.weight.add_(1)
        yield saved
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before

    @pytest.mark.parametrize("after", [0, 1, 2, 3])
    @pytest.mark.parametrize("call", ["fsync", "open"])
    def test_a_full_disk(self, untouched, monkeypatch, make_base, call, after):
        icae, folder = untouched
        real, calls = {"fsync": os.fsync, "open": open}[call], []

        def full(*args, **kwargs):
            calls.append(args)
            if len(calls) > after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            if call == "fsync":
                patch.setattr(os, "fsync", full)
            else:
                patch.setattr("icae_fast.io.files.open", full, raising=False)
            if after < 2:
                with pytest.raises(CheckpointError, match=r"No space left.*free space or choose another"):
                    icae.save_pretrained(folder)
            else:  # both files are written by then, so saving succeeds; this checks the simulation
                icae.save_pretrained(folder.parent / "elsewhere")
        assert ICAE.from_pretrained(folder, make_base()).config == icae.config

    def test_a_rename_that_fails(self, untouched, monkeypatch):
        icae, folder = untouched

        def fail(*args):
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(CheckpointError, match="Input/output error"):
            icae.save_pretrained(folder)

    def test_an_interrupt_leaves_nothing_behind(self, untouched, monkeypatch):
        icae, folder = untouched

        def interrupt(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            icae.save_pretrained(folder)

    @pytest.mark.parametrize("place", ["file", "/proc/icae"])
    def test_a_folder_that_cannot_be_made(self, make_icae, tmp_path, place):
        (tmp_path / "file").write_text("")
        with pytest.raises(CheckpointError, match="cannot save the adapter in"):
            make_icae().save_pretrained(tmp_path / place / "adapter")

    def test_the_json_file_counts_while_it_belongs_to_the_tensors(self, saved, make_icae, make_base):
        icae, folder = saved
        edit_header(folder, config=icae.config.replace(prompt_format="v1").to_dict())
        assert ICAE.from_pretrained(folder, make_base()).config.prompt_format == "v1"
        before = (folder / CONFIG_FILE).read_bytes()
        other = make_icae(memory_size=2)
        other.save_pretrained(folder)
        (folder / CONFIG_FILE).write_bytes(before)  # as a kill between the two renames leaves it
        assert ICAE.from_pretrained(folder, make_base()).config == other.config
        (folder / CONFIG_FILE).unlink()
        assert ICAE.from_pretrained(folder, make_base()).config == other.config

    def test_an_adapter_that_is_replaced_while_it_is_loaded(self, saved, make_icae, make_base, monkeypatch, random_ids):
        icae, folder = saved
        base, load = make_base(), hub.load_base_model

        def replace_first(*args):
            make_icae(memory_size=2).save_pretrained(folder)
            return load(*args)

        monkeypatch.setattr("icae_fast.model.icae.load_base_model", replace_first)
        assert_same(icae, ICAE.from_pretrained(folder, base), random_ids(30))

    def test_temporaries_of_killed_writers_are_deleted_and_others_stay(self, saved):
        icae, folder = saved
        names = [f".{TENSORS_FILE}.{'a' * 32}", f".{CONFIG_FILE}.{'b' * 32}"]
        others = [f".{TENSORS_FILE}.{'a' * 31}", f".notes.{'a' * 32}", f"{TENSORS_FILE}.{'a' * 32}"]
        for name in names + others:
            (folder / name).write_text("left")
        with (folder / names[0]).open() as writer:
            fcntl.flock(writer, fcntl.LOCK_EX)  # as a writer at work holds it
            icae.save_pretrained(folder)
        assert sorted(p.name for p in folder.iterdir()) == sorted([TENSORS_FILE, CONFIG_FILE, names[0], *others])

    def test_a_name_of_255_bytes(self, tmp_path):
        name = "é" * 127 + "x"
        files.write_atomically({tmp_path / name: b"content"})
        assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [(name, b"content")]

    def test_saving_over_an_adapter_replaces_it(self, saved, make_base):
        icae, folder = saved
        with torch.no_grad():
            icae.memory_token_embed.weight.add_(1)
        icae.save_pretrained(folder)
        again = ICAE.from_pretrained(folder, make_base())
        assert torch.equal(again.memory_token_embed.weight, icae.memory_token_embed.weight)
        assert len(list(folder.iterdir())) == 2


def test_the_config_as_json():
    config = ICAEConfig(memory_size=7, slot_scale="embedding_norm")
    assert ICAEConfig.from_dict(json.loads(config.to_json())) == config
    assert config.replace(memory_size=8).memory_size == 8
    assert config.lora_scale == 0.25
