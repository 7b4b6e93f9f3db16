"""Memory files: a round trip, and errors for a wrong model or a damaged file."""

import json

import pytest
import torch

from icae_fast import errors
from icae_fast.io.files import save_tensors
from icae_fast.store.memory_file import load_memory, read_memory_header, save_memory


@pytest.fixture
def saved(make_icae, random_ids, tmp_path):
    icae = make_icae()
    memory = icae.compress(random_ids(40))[0]
    save_memory(tmp_path / "a.icae", memory, icae)
    return icae, memory, tmp_path / "a.icae"


def test_round_trip(saved):
    icae, memory, path = saved
    loaded = load_memory(path, icae)
    assert torch.equal(loaded.slots, memory.slots)
    assert (loaded.n_source_tokens, loaded.span_lengths) == (40, memory.span_lengths)
    assert icae.restore(loaded, 8, return_ids=True) == icae.restore(memory, 8, return_ids=True)
    assert [p.name for p in path.parent.iterdir()] == ["a.icae"]


def test_another_adapter_or_base_is_refused(saved, make_icae):
    icae, _, path = saved
    with pytest.raises(errors.BaseModelMismatchError, match="other weights"):
        load_memory(path, make_icae(seed=5))
    with pytest.raises(errors.BaseModelMismatchError, match="model_type"):
        load_memory(path, make_icae("qwen3"))
    with torch.no_grad():
        icae.memory_token_embed.weight[0, 0] += 1
    with pytest.raises(errors.BaseModelMismatchError, match="another adapter"):
        load_memory(path, icae)


def test_damage_is_reported(saved, tmp_path):
    icae, _, path = saved
    content = path.read_bytes()
    for name, damaged in (("short", content[: len(content) // 2]), ("none", b""), ("text", b"hello")):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(errors.CheckpointError, match="truncated or not a safetensors file"):
            load_memory(tmp_path / name, icae)
    icae.save_pretrained(tmp_path / "adapter")
    with pytest.raises(errors.CheckpointError, match="no memory file"):
        read_memory_header(tmp_path / "adapter" / "adapter.safetensors")
    with pytest.raises(errors.CheckpointError, match="no file"):
        load_memory(tmp_path / "absent", icae)


def test_a_folder_that_cannot_be_written(saved, tmp_path):
    icae, memory, path = saved
    with pytest.raises(errors.CheckpointError, match="cannot write"):
        save_memory(path / "below-a-file", memory, icae)
    assert load_memory(path, icae).n_slots == memory.n_slots


def test_a_file_of_version_1_is_read(saved, make_icae, tmp_path):
    icae, memory, path = saved
    header = read_memory_header(path)[1]
    names = ("n_source_tokens", "span_lengths", "config", "base", "adapter_hash")
    old = {"format_version": 1} | {n: header[n] for n in names}
    save_tensors(tmp_path / "old", {"slots": memory.slots}, {"icae_memory": json.dumps(old)})
    loaded = load_memory(tmp_path / "old", icae)
    assert torch.equal(loaded.slots, memory.slots)
    assert (loaded.n_source_tokens, loaded.span_lengths) == (40, memory.span_lengths)
    with pytest.raises(errors.BaseModelMismatchError):
        load_memory(tmp_path / "old", make_icae(seed=5))
    for change, message in (
        ({"format_version": 2}, "lost its checksums"), ({"format_version": 9}, "install a newer"),
        ({"format_version": "1"}, "no memory file"), ({"base": "llama"}, "no memory file"),
        ({"config": {"k": 1}}, "no memory file"),
    ):  # fmt: skip
        save_tensors(tmp_path / "odd", {"slots": memory.slots}, {"icae_memory": json.dumps(old | change)})
        with pytest.raises(errors.CheckpointError, match=message):
            load_memory(tmp_path / "odd", icae)


def test_a_changed_byte_is_found(saved):
    icae, _, path = saved
    content = path.read_bytes()
    for i in (20, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:i] + bytes([content[i] ^ 4]) + content[i + 1 :])
        with pytest.raises(
            errors.CheckpointError, match=r"a.icae is damaged: the checksum of its (header|slots) is wrong"
        ):
            load_memory(path, icae)


def test_int8_slots(saved):
    icae, memory, path = saved
    size = path.stat().st_size
    save_memory(path, memory, icae, dtype="int8")
    slots = load_memory(path, icae).slots
    assert slots.dtype == icae.dtype
    assert ((slots - memory.slots).abs() <= 0.501 / 127 * memory.slots.abs().amax(dim=1, keepdim=True)).all()
    assert path.stat().st_size < size - 2 * memory.slots.numel()
